"""Any finite weights come back within the quantiser's error; any others are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.read_back import error_limit, relative_error
from kt_kernel import _ext
from kt_kernel.packed import METHODS

#: What is done to Gaussian weights before they are quantised.
KINDS = ("gaussian", "zeros", "zero block", "all equal", "subnormal", "outlier", "tiny and huge")


def weights(kind: str, n: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((n, k)).astype(np.float32)
    row, column = int(rng.integers(n)), int(rng.integers(k))
    if kind == "zeros":
        drawn[:] = 0
    elif kind == "zero block":
        drawn[row // 16 * 16 :][:16, : k // 2] = 0
    elif kind == "all equal":
        drawn[:] = drawn[0, 0]
    elif kind == "subnormal":
        drawn *= np.float32(1e-41)
    elif kind == "outlier":
        drawn[row, column] = 1e6
    elif kind == "tiny and huge":
        drawn *= np.exp2(rng.integers(-100, 100, (n, 1))).astype(np.float32)
    return drawn


def dequantized(values: np.ndarray, method: str) -> np.ndarray:
    n, k = values.shape
    parts = _ext.quantize_projection(values, "fp32", None, method)
    tables = _ext.int4_tables(method) if "table_index" in parts else None
    return _ext.dequantize_projection(
        parts["codes"].view(np.uint8),
        parts["scales"],
        parts.get("table_index"),
        tables,
        n,
        k,
        method,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(n=st.integers(1, 3), k=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_finite_weights_come_back(kind: str, method: str, n: int, k: int, seed: int) -> None:
    values = weights(kind, 64 * n, 64 * k, seed)
    got = dequantized(values, method)
    assert np.isfinite(got).all()
    if kind == "subnormal":
        # Below what a bf16 scale can say of a row: lost, but never blown up.
        assert np.abs(got).max() <= 2 * np.abs(values).max()
        return
    assert relative_error(got, values) <= error_limit(values, method)
    assert not got[~values.any(axis=1)].any()  # rows of zeros stay zero


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    bad=st.sampled_from([np.inf, -np.inf, np.nan]),
    row=st.integers(0, 63),
    column=st.integers(0, 127),
)
def test_one_bad_weight_is_named(method: str, bad: float, row: int, column: int) -> None:
    values = weights("gaussian", 64, 128, 0)
    values[row, column] = bad
    with pytest.raises(ValueError, match=f"row {row}, column {column}"):
        _ext.quantize_projection(values, "fp32", None, method)
