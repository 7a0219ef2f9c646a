"""Packed layers at real size, of random codes, with the manifest that ``serve`` asks for.

One file may stand under all layers' names: 6 GB on a disk, N times as many in memory. What is
measured stays the same. Each layer reads the file into memory of its own, so no cache of the CPU
serves one layer with what another has read; the time of a product does not depend on the weights'
values; and which experts a token takes is decided by each layer's own router, from the checkpoint.
Only the time to load would be another: from a slow disk, one file may be in a cache behind it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convert.manifest import Identity, Manifest
from convert.manifest_file import LayerRecord
from convert.source.checkpoint import Checkpoint
from deploy.launch.gpu_memory import V32_CONFIG
from kt_kernel import KTMoEWrapper, _ext, packed
from kt_kernel.files.safetensors_header import header_bytes
from kt_kernel.layer_weights import ONE_FILE_VARIABLE

#: Bytes of random codes; layers begin at different places of them.
DRAWN = 1 << 28
#: Layers written at the same time: memory is what limits it.
AT_ONCE = 4
#: About the root mean square of an integer weight, by which the scale divides the wanted one.
TABLE_STD, CODE_STD = 40.0, 74.0


def layer_bytes(layout: packed.PackedLayout) -> int:
    """Of one layer's file, but for its header."""
    return sum(spec.nbytes for spec in layout.tensors().values())


def write_layers(folder: Path, layout: packed.PackedLayout, layers: Sequence[int]) -> None:
    """Write the files of these layers."""
    drawn = np.random.default_rng(0).integers(0, 256, DRAWN, np.uint8)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda layer: _write_layer(folder, layout, layer, drawn), layers))


def load_layer(
    folder: Path, layout: packed.PackedLayout, layer: int, resident: int, threads: int
) -> KTMoEWrapper:
    """The layer of such a file, loaded, with V3.2's top-k and so many experts on the GPU."""
    wrapper = KTMoEWrapper(
        layer,
        layout.num_experts,
        V32_CONFIG["num_experts_per_tok"],
        layout.hidden_size,
        layout.intermediate_size,
        num_gpu_experts=resident,
        cpuinfer_threads=threads,
        weight_path=str(folder),
        method=packed.METHODS[layout.method].kt_method,
    )
    wrapper.load_weights(torch.arange(layout.num_experts))
    return wrapper


def _write_layer(
    folder: Path, layout: packed.PackedLayout, layer: int, drawn: NDArray[np.uint8]
) -> None:
    offset = 4096 * layer
    with (folder / packed.layer_file_name(layer)).open("wb", buffering=0) as file:
        file.write(header_bytes(layout.tensors(), layout.metadata(layer)))
        for name, spec in layout.tensors().items():
            projection, _, part = name.partition(".")
            if name == "tables":
                _write(file.fileno(), np.asarray(_ext.int4_tables(layout.method), np.int8))
            elif part == "scales":
                k = layout.projection_shape(projection)[1]
                std = TABLE_STD if layout.has_tables else CODE_STD
                scale = torch.tensor(k**-0.5 / std, dtype=torch.bfloat16)
                bits = np.uint16(scale.view(torch.int16).item())
                _write(file.fileno(), np.full(spec.nbytes // 2, bits))
            else:
                left = spec.nbytes
                while left:
                    part_of = drawn[offset : offset + left]
                    _write(file.fileno(), part_of)
                    left -= len(part_of)
                    offset = 0 if left else (offset + len(part_of)) % DRAWN


def _write(file: int, data: NDArray[Any]) -> None:
    """All of it: one call of the system writes 2 GiB at most."""
    rest = data.reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[os.write(file, rest) :]


def one_file(layer: int) -> dict[str, str]:
    """The variable by which a server takes the file of ``layer`` for those of all layers."""
    return {ONE_FILE_VARIABLE: str(layer)}


def write_view(
    folder: Path,
    layers_in: Path,
    model: Path,
    layout: packed.PackedLayout,
    only: int | None = None,
) -> None:
    """The weights of the checkpoint ``model``, of links to files, with their manifest.

    Args:
        folder: made here.
        layers_in: of ``write_layers``.
        model: the checkpoint's folder.
        layout: of the packed layers.
        only: the layer whose file is linked for all of them; None for each layer's own.
    """
    folder.mkdir(parents=True)
    with Checkpoint(model) as checkpoint:
        moe_layers = tuple(checkpoint.dims.moe_layers())
        identity = Identity(
            fingerprint=checkpoint.fingerprint(),
            layout=layout,
            model_type=checkpoint.dims.model_type,
            moe_layers=moe_layers,
            quantizer={"made": "at random"},
            input_type="fp8",
            files=checkpoint.file_digests(),
            shards={},
        )
    manifest = Manifest(folder, identity)
    for layer in moe_layers:
        name = packed.layer_file_name(layer)
        source = name if only is None else packed.layer_file_name(only)
        _link(layers_in / source, folder / name)
        # Nothing was converted, so there is nothing to prove: no digests and no errors.
        manifest.layers[layer] = LayerRecord(name, (folder / name).stat().st_size, "", {}, {})
    (folder / packed.MANIFEST_NAME).write_bytes(manifest.content())


def _link(file: Path, name: Path) -> None:
    """Another name of a file, also where there are no hard links: on another filesystem."""
    try:
        os.link(file, name)
    except OSError:
        name.symlink_to(file.resolve())
