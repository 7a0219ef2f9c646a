"""Slow references for the kernels, straight from the definitions, in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from kt_kernel import _ext
from kt_kernel.packed import BLOCK_K

#: Error of an output row, relative to the mean: float rounding, and one step of one intermediate.
ROUNDING, ONE_STEP = 2e-5, 8e-3


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 rows and their scales: q = round-half-even(x * (127 / max|x|)), all in float32."""
    top = np.abs(x).max(axis=1, keepdims=True).astype(np.float32)
    inverse = np.where(top > 0, np.float32(127) / np.where(top > 0, top, 1), 0).astype(np.float32)
    return np.rint(x * inverse), (top / np.float32(127))


def slice_bounds(intermediate_size: int, slices: int) -> list[tuple[int, int]]:
    """[begin, end) of each slice: whole units of 64, as equal as they can be."""
    units = intermediate_size // 64
    count = min(slices, units)
    cuts = [64 * (units * s // count) for s in range(count + 1)]
    return list(itertools.pairwise(cuts))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dequantize(packed: dict[str, np.ndarray], n: int, k: int, method: str) -> np.ndarray:
    """[n, k] float64 weights of one packed projection."""
    tables = _ext.int4_tables(method) if method in BLOCK_K else None
    index = packed.get("table_index")
    weights = _ext.dequantize_projection(
        packed["codes"], packed["scales"], index, tables, n, k, method
    )
    return weights.astype(np.float64)


def moe(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    experts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]],
    quantize_activations: bool,
    slices: int = 1,
) -> np.ndarray:
    """Sum over each token's top-k of weight * expert(x); experts that are not given are skipped.

    Args:
        x: float32 [T, H]; ids: int [T, k]; weights: float32 [T, k].
        experts: expert id -> float64 (gate [I, H], up [I, H], down [H, I]).
        quantize_activations: int8 for each row of x and of the intermediate, as the kernels do.
        slices: parts of the intermediate that are quantised by themselves.
    """
    out = np.zeros(x.shape)
    for e, (gate, up, down) in experts.items():
        tokens, slots = np.nonzero(ids == e)
        if len(tokens) == 0:
            continue
        rows = x[tokens]
        if quantize_activations:
            q, scale = quantize_rows(rows)
            h = (silu(q @ gate.T * scale) * (q @ up.T * scale)).astype(np.float32)
            y = np.zeros((len(tokens), x.shape[1]))
            for begin, end in slice_bounds(h.shape[1], slices):
                q, scale = quantize_rows(h[:, begin:end])
                y += q @ down[:, begin:end].T * scale
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
