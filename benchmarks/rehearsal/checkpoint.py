"""The GPU's part of a checkpoint at real size, with random weights, written as fast as memory is.

Values are drawn once and repeated at another offset for each tensor: what is measured depends on
their scale, by which activations stay finite and tokens take different experts, and not on each of
them. Of the routed experts only those that stay on the GPU are written; SGLang reads no others.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convert.source.checkpoint import INDEX_NAME
from convert.source.config import CONFIG_NAME
from convert.source.experts import parse_expert_name
from examples.tiny.config import TinySizes, model_config
from examples.tiny.tensors import SCALE_SUFFIX, TensorSpec, tensor_specs
from kt_kernel.files import safetensors_header

#: Values drawn. A prime, so that no row of a matrix begins where another does.
DRAWN = (1 << 24) - 3
#: Standard deviation of the FP8 codes: their largest, at 6 of these, is below e4m3's 448.
CODE_STD = 64.0
#: Files written at the same time.
AT_ONCE = 4


class Values:
    """Gaussian values of standard deviation 1 as FP8 codes times 64, and as bf16."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(DRAWN, generator=generator)
        self._codes = (drawn * CODE_STD).clamp(-448, 448).to(torch.float8_e4m3fn)
        self._floats = drawn

    def codes(self, spec: TensorSpec) -> NDArray[Any]:
        """FP8 bits of a "linear" tensor, flat: as many as it has, or as were drawn."""
        return _from(self._codes, spec).view(torch.uint8).numpy()

    def scales(self, spec: TensorSpec) -> NDArray[Any]:
        """The scales of its blocks, flat: the power of two that is nearest to what is wanted."""
        power = np.exp2(np.rint(np.log2(spec.std / CODE_STD)))
        return np.full(int(np.prod(spec.scale_shape)), power, np.float32)

    def plain(self, spec: TensorSpec) -> NDArray[Any]:
        """Values of another tensor, as the codes; bf16 as its bits."""
        floats = _from(self._floats, spec) * spec.std + spec.center
        if spec.kind == "f32":
            return floats.numpy()
        return floats.to(torch.bfloat16).view(torch.int16).numpy()


def _from(drawn: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """At most as many of the values as the tensor has, from an offset that its name gives."""
    count = int(np.prod(spec.shape))
    offset = zlib.crc32(spec.name.encode()) % len(drawn)
    if offset + count <= len(drawn):
        return drawn[offset : offset + count]
    return torch.cat((drawn[offset:], drawn[:offset]))[:count]


def shards(sizes: TinySizes, resident: int) -> dict[str, list[TensorSpec]]:
    """File -> its tensors: one file for each layer, so that fewer layers are fewer files."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in tensor_specs(sizes):
        expert = parse_expert_name(spec.name)
        if expert is not None and expert[1] >= resident:
            continue
        parts = spec.name.split(".")
        layer = f"layer-{int(parts[2]):03d}" if parts[1] == "layers" else "ends"
        found.setdefault(f"model-{layer}.safetensors", []).append(spec)
    return found


_DTYPES = {"bf16": "BF16", "f32": "F32", "linear": "F8_E4M3"}


def write_shards(folder: Path, sizes: TinySizes, resident: int) -> None:
    """Write all tensors of the model but the routed experts from ``resident`` on."""
    values = Values()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = shards(sizes, resident).items()
        list(pool.map(lambda item: _write_shard(folder / item[0], item[1], values), files))


def _write_shard(path: Path, specs: list[TensorSpec], values: Values) -> None:
    entries: dict[str, safetensors_header.TensorSpec] = {}
    for spec in specs:
        entries[spec.name] = safetensors_header.TensorSpec(_DTYPES[spec.kind], spec.shape)
        if spec.kind == "linear":
            entries[spec.name + SCALE_SUFFIX] = safetensors_header.TensorSpec(
                "F32", spec.scale_shape
            )
    with path.open("wb") as file:
        file.write(safetensors_header.header_bytes(entries, {"format": "pt"}))
        for spec in specs:
            data = values.codes(spec) if spec.kind == "linear" else values.plain(spec)
            left = entries[spec.name].nbytes
            while left:
                left -= file.write(data.view(np.uint8).data[:left])
            if spec.kind == "linear":
                file.write(values.scales(spec).data)


def write_view(folder: Path, shards_in: Path, sizes: TinySizes, resident: int) -> None:
    """A checkpoint of these sizes, of hard links to the shards that it has."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for name, specs in shards(sizes, resident).items():
        os.link(shards_in / name, folder / name)
        total += (folder / name).stat().st_size
        weight_map |= dict.fromkeys(_names(specs), name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / CONFIG_NAME).write_text(json.dumps(model_config(sizes, "fp8"), indent=2))


def _names(specs: Iterable[TensorSpec]) -> list[str]:
    return [
        name
        for spec in specs
        for name in (
            (spec.name, spec.name + SCALE_SUFFIX) if spec.kind == "linear" else (spec.name,)
        )
    ]
