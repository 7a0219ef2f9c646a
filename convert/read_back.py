"""Reads a written layer file back and compares it with the source, before it gets its final name.

The public safetensors library must agree about every tensor's shape and dtype. A sample is compared
with the source, which is decoded with NumPy for this and by the extension when it is packed (but
for INT4 sources, which both decode in one way); the packed weights are decoded by the extension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import safe_open

from convert.quantize import quantize_projection
from convert.source.experts import ExpertProjection, ExpertSource
from convert.workers import StopRequest, run_all
from convert.writer import CHECKSUMS_KEY, hash_file
from kt_kernel import _ext
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import Header, raw_type, read_header
from kt_kernel.packed import METHODS, PROJECTIONS, PackedLayout, check_layer_header

_ADVICE = "the file is wrong; check disk and memory of this host and run the same command again"


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference; 0 if both are all zeros."""
    # In float64: no square overflows, and the sum's order shows on no host. In parts: less memory.
    signal = noise = 0.0
    for begin in range(0, len(reference), 256):
        exact = reference[begin : begin + 256].astype(np.float64)
        signal += float(np.square(exact).sum())
        noise += float(np.square(values[begin : begin + 256] - exact).sum())
    if signal == 0:
        return math.inf if noise else 0.0
    return math.sqrt(noise / signal)


def error_limit(reference: np.ndarray, method: str) -> float:
    """The largest relative error that quantisation can explain for these weights.

    The levels of a row are whole multiples of (largest magnitude / 127), so a row with one large
    outlier keeps little of its other weights, in INT8 as in INT4: half such a step for each weight
    is added to the method's limit.
    """
    row_largest = np.abs(reference).max(axis=1)
    largest = float(row_largest.max())
    if largest == 0:
        return 0.0
    half_steps = float(np.linalg.norm(row_largest / largest)) / 127 / 2
    floor = half_steps * math.sqrt(reference.shape[1])
    return math.hypot(
        METHODS[method].error_limit, floor / float(np.linalg.norm(reference / largest))
    )


def sample_experts(layer_idx: int, num_experts: int) -> list[int]:
    """The experts that are checked against the source: first, last, and one that varies."""
    return sorted({0, num_experts - 1, layer_idx * 31 % num_experts})


def verify_layer_file(
    path: Path,
    layer_idx: int,
    layout: PackedLayout,
    source: ExpertSource,
    pool: ThreadPoolExecutor,
    stop: StopRequest,
) -> tuple[str, dict[str, float]]:
    """Check a layer file against its layout and a sample of its experts against the source.

    Returns:
        SHA-256 of the whole file, as read back, and the relative error of each sampled matrix by
        ``expert.projection``.

    Raises:
        UserError: names the file, the tensor and what is wrong.
    """
    check_with_safetensors(path, layout, layer_idx)
    digests: list[str] = []

    def read_back() -> None:
        try:
            digests.append(hash_file(path, stop))
        except OSError as error:
            raise UserError(f"cannot read {path} back: {error.strerror}") from None

    errors = check_sample(path, layer_idx, layout, source, pool, stop, beside=[read_back])
    return digests[0], errors


def check_sample(
    path: Path,
    layer_idx: int,
    layout: PackedLayout,
    source: ExpertSource,
    pool: ThreadPoolExecutor,
    stop: StopRequest,
    beside: Sequence[Callable[[], None]] = (),
) -> dict[str, float]:
    """Compare a sample of a layer file's experts with the source, while ``beside`` runs as well.

    Returns:
        The relative error of each sampled matrix by ``expert.projection``.

    Raises:
        UserError: names the file, the tensor and what is wrong.
    """
    errors: dict[str, float] = {}

    def check_item(item: ExpertProjection) -> None:
        _check_place(path, layout, source, item)
        reference = source.weights(item)
        error = relative_error(read_packed(path, layout, item), reference)
        limit = error_limit(reference, layout.method)
        if not error <= limit:
            raise UserError(
                f"{path}: {item.weight} differs from the source by {error:.3f} (relative "
                f"Frobenius error), expected at most {limit:.3f}: {_ADVICE}"
            )
        errors[f"{item.expert}.{item.projection}"] = round(error, 6)

    sample = [
        ExpertProjection(layer_idx, expert, projection)
        for expert in sample_experts(layer_idx, layout.num_experts)
        for projection in PROJECTIONS
    ]
    run_all(pool, [*beside, *(functools.partial(check_item, item) for item in sample)], stop)
    return dict(sorted(errors.items()))


def _check_place(
    path: Path,
    layout: PackedLayout,
    source: ExpertSource,
    item: ExpertProjection,
) -> None:
    """Quantise the matrix once more: exactly these bytes must be at this expert's place.

    The error alone would not notice two experts' scales exchanged: they differ by a few per cent.
    """
    parts = quantize_projection(source, item, layout.method)
    header = read_header(path)
    for part, values in parts.items():
        stored = read_stored(header, f"{item.projection}.{part}", item.expert)
        if stored.tobytes() != values.tobytes():
            raise UserError(
                f"{path}: {item.projection}.{part} of expert {item.expert} is not what "
                f"{item.weight} gives: {_ADVICE}"
            )


def check_with_safetensors(path: Path, layout: PackedLayout, layer_idx: int) -> None:
    """Open a layer file with our reader and with the public one, and compare all shapes.

    Raises:
        UserError: either cannot read it, or it is not the file that the layout describes.
    """
    check_layer_header(read_header(path), layout, layer_idx)
    try:
        with safe_open(path, framework="numpy") as file:
            found = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118 (not a dict, has no __iter__)
            }
            checksums = (file.metadata() or {}).get(CHECKSUMS_KEY)
    except Exception as error:  # safetensors' own error class is not exported as a base class
        raise UserError(f"{path} cannot be read back with safetensors: {error}") from None
    expected = {name: (spec.dtype, spec.shape) for name, spec in layout.tensors().items()}
    if found != expected or not checksums:
        raise UserError(f"{path} was not written correctly: it holds {found}, expected {expected}")


def read_stored(header: Header, name: str, expert: int | None = None) -> np.ndarray:
    """Raw bits of a tensor of a layer file, or of one expert's slice of it.

    Read by offset: the public library gives NumPy no bf16, and torch takes seconds to import.

    Raises:
        UserError: the file cannot be read.
    """
    entry = header.tensors[name]
    shape, begin = entry.shape, entry.begin
    if expert is not None:
        begin += expert * ((entry.end - entry.begin) // shape[0])
        shape = shape[1:]
    try:
        flat = np.fromfile(header.path, raw_type(entry.dtype), math.prod(shape), offset=begin)
        return flat.reshape(shape)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name} of {header.path} back: {error}") from None


def read_packed(path: Path, layout: PackedLayout, item: ExpertProjection) -> np.ndarray:
    """One matrix of a layer file, dequantised to float32 [N, K]."""
    n, k = layout.projection_shape(item.projection)
    header = read_header(path)

    def part(name: str) -> np.ndarray:
        return read_stored(header, f"{item.projection}.{name}", item.expert)

    index = tables = None
    if layout.has_tables:
        index, tables = part("table_index"), read_stored(header, "tables")
    codes = part("codes").view(np.uint8)
    return _ext.dequantize_projection(codes, part("scales"), index, tables, n, k, layout.method)
