"""Layer files written by hand, whole or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kt_kernel import _ext, packed
from kt_kernel.files.safetensors_header import TensorSpec, header_bytes
from kt_kernel.packed import PackedLayout

LAYOUTS = {method: PackedLayout(4, 256, 64, method) for method in packed.METHODS}


def write_layer(
    folder: Path,
    layout: PackedLayout,
    layer_idx: int,
    metadata: dict[str, str] | None = None,
    drop: str | None = None,
    reshape: str | None = None,
) -> Path:
    """A layer file of quantised random weights; ``metadata`` replaces entries, ``drop`` leaves a
    tensor out, ``reshape`` flattens one."""
    rng = np.random.default_rng(layer_idx)
    tensors: dict[str, np.ndarray] = {}
    for projection in packed.PROJECTIONS:
        n, k = layout.projection_shape(projection)
        experts = [
            _ext.quantize_projection(
                rng.standard_normal((n, k)).astype(np.float32), "fp32", None, layout.method
            )
            for _ in range(layout.num_experts)
        ]
        for part in experts[0]:
            tensors[f"{projection}.{part}"] = np.stack([expert[part] for expert in experts])
    if layout.has_tables:
        tensors["tables"] = _ext.int4_tables(layout.method)

    specs = {name: spec for name, spec in layout.tensors().items() if name != drop}
    if reshape is not None:
        spec = specs[reshape]
        specs[reshape] = TensorSpec(spec.dtype, (int(np.prod(spec.shape)),))
    data = b"".join(tensors[name].tobytes() for name in specs)
    header = header_bytes(specs, layout.metadata(layer_idx) | (metadata or {}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / packed.layer_file_name(layer_idx)
    path.write_bytes(header + data)
    return path


def write_random_layer(folder: Path, layout: PackedLayout) -> None:
    """The file of layer 0 with codes that stand for no weights: quick, where only bytes matter."""
    rng = np.random.default_rng(0)
    with (folder / packed.layer_file_name(0)).open("wb") as file:
        file.write(header_bytes(layout.tensors(), layout.metadata(0)))
        for name, spec in layout.tensors().items():
            if name == "tables":
                file.write(_ext.int4_tables(layout.method).tobytes())
            elif name.endswith("scales"):
                file.write(np.full(spec.shape, 0x38D2, np.uint16).tobytes())  # bf16 of 1e-4
            else:
                file.write(rng.bytes(spec.nbytes))
