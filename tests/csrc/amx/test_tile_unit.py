"""Tile instructions against the manual's pseudo-code, in NumPy: the CPU's or the emulator's, and
what stands in for their intrinsics."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.csrc import portable_isa
from tests.csrc.amx import emulator

needs_simde = pytest.mark.skipif(not portable_isa.can_build(), reason=portable_isa.NEEDS)


@pytest.fixture(params=["instructions", pytest.param("stand-ins", marks=needs_simde)])
def unit(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """programs.cpp."""
    if request.param == "stand-ins":
        return portable_isa.library()
    emulator.catch_instructions()
    return emulator.library()


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("kind", range(4), ids=["ss", "su", "us", "uu"])
@pytest.mark.parametrize(
    ("m", "n", "k4", "gap"), [(16, 16, 16, 0), (1, 1, 1, 0), (5, 7, 3, 24), (16, 3, 16, 64)]
)
def test_product(unit: ctypes.CDLL, kind: int, m: int, n: int, k4: int, gap: int) -> None:
    """c[m, n] += sum over k, j of a[m, 4 k + j] * b[k, 4 n + j], modulo 2^32."""
    rng = np.random.default_rng(kind)
    a = rng.integers(0, 256, (m, 4 * k4 + gap), dtype=np.uint8)
    b = rng.integers(0, 256, (k4, 4 * n + gap), dtype=np.uint8)
    c = rng.integers(-(2**31), 2**31, (m, n + gap), dtype=np.int64).astype(np.int32)
    a_type = np.int8 if kind in (0, 1) else np.uint8
    b_type = np.int8 if kind in (0, 2) else np.uint8
    left = a.view(a_type)[:, : 4 * k4].astype(np.int64)
    quads = b.view(b_type)[:, : 4 * n].astype(np.int64).reshape(k4, n, 4)
    right = quads.transpose(0, 2, 1).reshape(4 * k4, n)
    want = c.copy()
    want[:, :n] = (c[:, :n].astype(np.int64) + left @ right).astype(np.int32)
    unit.run_product(
        kind,
        m,
        n,
        k4,
        address(a),
        ctypes.c_long(a.strides[0]),
        address(b),
        ctypes.c_long(b.strides[0]),
        address(c),
        ctypes.c_long(c.strides[0]),
    )
    assert np.array_equal(c, want)


def test_configuration(unit: ctypes.CDLL) -> None:
    config, loaded, released = (np.full(64, 255, np.uint8) for _ in range(3))
    config[:] = 0
    config[0] = 1
    config[16:32].view(np.uint16)[:] = [64, 60, 4, 64, 8, 12, 16, 64]
    config[48:56] = [16, 1, 2, 16, 8, 7, 6, 5]
    zeroed = np.full((16, 64), 7, np.uint8)
    unit.run_config(address(config), address(loaded), address(released), address(zeroed))
    assert np.array_equal(loaded, config)
    assert not released.any()
    assert not zeroed.any()
