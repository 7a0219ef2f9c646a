"""Slow references for the kernels, straight from the definitions, in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from kt_kernel import _ext
from kt_kernel.packed import METHODS

#: Weights of one expert: gate [I, H], up [I, H], down [H, I].
Expert = tuple[np.ndarray, np.ndarray, np.ndarray]

#: Error of an output row, relative to the mean: float rounding, and one step of one intermediate.
ROUNDING, ONE_STEP = 2e-5, 8e-3


OUTLIER_STEPS, OUTLIER_RATIO, LEAST_OUTLIER_K = 16, 4, 256
#: Rows below TINY have scales near the subnormal floats, of which SUBNORMAL is the smallest.
TINY, SUBNORMAL, LIFT = 2.0**-118, 2.0**-149, np.float32(2.0**64)


def through_int8(x: np.ndarray) -> np.ndarray:
    """float32 rows -> what their int8 form stands for, float64.

    One scale for each row, q = round-half-even(x * (127 / max|x|)), all in float32. Where at most
    16 steps of 4 k hold a value above a quarter of the largest, the values of the 16 largest steps
    that are above all other steps come in two terms: int8 with a scale of their own, and what that
    leaves, with the row's scale. In a tiny row, q = round-half-even(x / scale) with the scale
    rounded up to what float32 holds.
    """
    f32 = np.float32
    result = np.empty(x.shape)
    for row, out in zip(x.astype(f32), result, strict=True):
        top = np.abs(row).max()
        steps = np.abs(row).reshape(-1, 4).max(axis=1)
        large = np.zeros_like(row)
        apart = np.zeros(len(row))
        few = (steps > top / OUTLIER_RATIO).sum() <= OUTLIER_STEPS
        if top > 1e-30 and len(row) >= LEAST_OUTLIER_K and few:
            limit = np.sort(steps)[-OUTLIER_STEPS - 1]
            large = np.where(np.abs(row) > limit, row, f32(0))
            q = np.rint(large * (f32(127) / top))
            apart = q.astype(np.float64) * (top / f32(127))
            row = row - q * (top / f32(127))
        rest = np.abs(row).max()
        if apart.any():
            rest = max(rest, top / f32(65536))
        scale = rest / f32(127)
        if 0 < rest < TINY:
            scale += f32(SUBNORMAL) if scale * f32(127) < rest else f32(0)
            row, inverse = row * LIFT, f32(1) / (scale * LIFT)
        else:
            inverse = f32(127) / rest if rest > 0 else f32(0)
        out[:] = np.rint(row * inverse).astype(np.float64) * scale + apart
    return result


def slice_bounds(intermediate_size: int, slices: int) -> list[tuple[int, int]]:
    """[begin, end) of each slice: whole units of 64, as equal as they can be."""
    units = intermediate_size // 64
    count = min(slices, units)
    cuts = [64 * (units * s // count) for s in range(count + 1)]
    return list(itertools.pairwise(cuts))


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # far below zero: -0
        return np.asarray(x / (1 + np.exp(-x)))


def dequantize(packed: dict[str, np.ndarray], n: int, k: int, method: str) -> np.ndarray:
    """[n, k] float64 weights of one packed projection."""
    tables = _ext.int4_tables(method) if METHODS[method].block_k else None
    index = packed.get("table_index")
    weights = _ext.dequantize_projection(
        packed["codes"], packed["scales"], index, tables, n, k, method
    )
    return weights.astype(np.float64)


def moe(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    experts: dict[int, Expert],
    quantize_activations: bool,
    slices: int = 1,
) -> np.ndarray:
    """Sum over each token's top-k of weight * expert(x); experts that are not given are skipped.

    Args:
        x: float32 [T, H]; ids: int [T, k]; weights: float32 [T, k].
        experts: expert id -> float64 matrices.
        quantize_activations: int8 for x and the intermediate, as the kernels do.
        slices: parts of the intermediate that are quantised by themselves.
    """
    out = np.zeros(x.shape)
    for e, (gate, up, down) in experts.items():
        tokens, slots = np.nonzero(ids == e)
        if len(tokens) == 0:
            continue
        rows = x[tokens]
        if quantize_activations:
            q = through_int8(rows)
            h = (silu(q @ gate.T) * (q @ up.T)).astype(np.float32)
            y = np.zeros((len(tokens), x.shape[1]))
            for begin, end in slice_bounds(h.shape[1], slices):
                y += through_int8(h[:, begin:end]) @ down[:, begin:end].T
        else:
            y = (silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        np.add.at(out, tokens, y * weights[tokens, slots][:, None])
    return out


def assert_same(found: torch.Tensor, expected: np.ndarray) -> None:
    """A layer's rows are those of the definition.

    Kernel and definition do the same integer sums and differ in float rounding. Where that moves
    one value of an intermediate row across a quantisation step, all of the row's output moves a
    little: for fewer than one row in 50 or one alone.
    """
    rows = np.abs(found.double().numpy() - expected).mean(axis=1) / np.abs(expected).mean()
    assert rows.max() < ONE_STEP
    assert (rows > ROUNDING).sum() <= 1 + len(rows) // 50


def relative_error(found: np.ndarray | torch.Tensor, expected: np.ndarray) -> float:
    """mean|found - expected| / mean|expected|, the measure of docs/weight-format.md."""
    found = np.asarray(found, np.float64)
    return float(np.abs(found - expected).mean() / np.abs(expected).mean())
