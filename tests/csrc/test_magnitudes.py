"""A layer over all magnitudes of floats: finite where a plain float layer is, and near it."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_kernel import KTMoEWrapper, packed
from tests import reference
from tests.conftest import INTEGER_TARGETS
from tests.layers import RandomLayer
from tests.shapes import LayerShape

SHAPE = LayerShape(2, 1, 256, 64)

#: What a quantised row may be off by, of the layer's largest output: two activation quantisations.
BOUND = 0.05


@functools.cache
def layer(gain: float) -> RandomLayer:
    """A layer whose weights are ``gain`` times the usual ones."""
    made = RandomLayer(SHAPE)
    made.gate, made.up, made.down = (w * gain for w in (made.gate, made.up, made.down))
    return made


@functools.cache
def wrapper(gain: float, method: str, target: str) -> KTMoEWrapper:
    before = os.environ.get("KT_TARGET")
    os.environ["KT_TARGET"] = target
    try:
        return layer(gain).wrapper(method)
    finally:
        del os.environ["KT_TARGET"]
        if before is not None:
            os.environ["KT_TARGET"] = before


def row(magnitude: float, kind: str, seed: int) -> np.ndarray:
    """float32 [H]: Gaussian, a few values alone, or a few large ones above the others."""
    x = np.random.default_rng(seed).standard_normal(SHAPE.hidden_size)
    if kind == "few":
        x[3:] = 0
    elif kind == "outliers":
        x[::50] *= 300
    scaled: np.ndarray = x * (magnitude / np.abs(x).max())
    return scaled.astype(np.float32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    magnitude=st.floats(1e-45, 1e38) | st.integers(-45, 38).map(lambda e: float(f"3.1e{e}")),
    kind=st.sampled_from(["all", "few", "outliers"]),
    gain=st.sampled_from([2.0**-30, 1.0, 2.0**40]),
    weight=st.sampled_from([1e-20, 0.3, 1e30]),
    method=st.sampled_from(list(packed.METHODS)),
    many=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_magnitude(
    magnitude: float, kind: str, gain: float, weight: float, method: str, many: bool, seed: int
) -> None:
    tokens = 10 if many else 1  # tokens that workers quantise, and such that they are given so
    x = np.stack([row(magnitude, kind, seed + t) for t in range(tokens)])
    ids = torch.ones(tokens, 1, dtype=torch.int32)
    weights = torch.full((tokens, 1), weight)

    def run(target: str) -> torch.Tensor:
        return wrapper(gain, method, target).forward(torch.from_numpy(x), ids, weights)

    plain = run("reference")
    found = [run(target) for target in INTEGER_TARGETS]
    for other in found[1:]:
        assert torch.equal(other.nan_to_num(), found[0].nan_to_num())
    if not plain.isfinite().all():
        return  # what overflows without int8 may do so with it
    assert found[0].isfinite().all()
    largest = float(plain.abs().max())
    error = float((found[0] - plain).abs().max())
    # Roundings of subnormal intermediate values and outputs.
    lost = reference.SUBNORMAL * (2 + gain * weight * SHAPE.intermediate_size)
    assert error <= BOUND * largest + lost, (error, largest)


# Else the intermediate values would be too small for floats; with the larger one, a sum times the
# weights' scale would be too large.
@pytest.mark.parametrize("gain", [2.0**100, 2.0**123])
@pytest.mark.parametrize("magnitude", [3e-37, 1e-38, 1e-41, 1e-45])
def test_tiny_rows_match_definition(
    target: str, method: str, magnitude: float, gain: float
) -> None:
    """127 / max overflows for these, and max / 127 has few bits or none."""
    many = layer(gain)
    x = np.stack([row(magnitude, "all", seed) for seed in range(10)])
    ids, weights = torch.ones(10, 1, dtype=torch.int32), torch.full((10, 1), 0.7)
    experts = many.packed(method)
    found = wrapper(gain, method, target).forward(torch.from_numpy(x), ids, weights)
    assert found.any()
    assert found.isfinite().all()
    want = reference.moe(x, ids.numpy(), weights.numpy(), experts, True)
    reference.assert_same(found, want)
