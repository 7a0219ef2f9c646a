"""Inputs and the float reference that decide whether an engine's output is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import layer_inputs
from benchmarks.layer_inputs import swiglu_expert, write_checks, write_sources
from benchmarks.workers import protocol
from benchmarks.workers.protocol import choose_experts, from_bf16, relative_error, to_bf16


def test_bf16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    values[:3] = (1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8))  # half way: to even
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(from_bf16(to_bf16(values)), expected.float().numpy())


def test_experts_of_a_token_are_distinct_and_allowed() -> None:
    allowed = np.array([1, 3, 5, 7, 9, 11, 13, 15, 17])
    ids = choose_experts(np.random.default_rng(2), 200, allowed)
    assert ids.shape == (200, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert set(ids.ravel()) == set(allowed)


def test_an_output_with_a_nan_is_infinitely_wrong() -> None:
    ones = np.ones((2, 3), np.float32)
    broken = ones.copy()
    broken[1, 2] = np.nan
    assert relative_error(broken, ones) == float("inf")
    assert relative_error(1.5 * ones, ones) == 0.5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layer_inputs, protocol):
        monkeypatch.setattr(module, "HIDDEN", 64)
        monkeypatch.setattr(module, "INTERMEDIATE", 32)


def test_the_reference_is_that_of_a_plain_loop(small: None, tmp_path: Path) -> None:
    write_sources(tmp_path, each=2)
    matrices = [np.load(tmp_path / f"{p}.npy") for p in ("gate", "up", "down")]
    assert [m.shape for m in matrices] == [(4, 32, 64), (4, 32, 64), (4, 64, 32)]
    files = write_checks(tmp_path, experts=32, sizes=(3,))
    for name, allowed in (("gaussian", {0, 1}), ("t5", {2, 3})):
        with np.load(files[name][0]) as check:
            assert {int(e) % 4 for e in check["ids"].ravel()} == allowed
            x = torch.from_numpy(from_bf16(check["x"]))
            for token in range(3):
                expected = torch.zeros(64)
                for slot in range(8):
                    source = check["ids"][token, slot] % 4
                    gate, up, down = (torch.from_numpy(from_bf16(m[source])) for m in matrices)
                    inner = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
                    expected += float(check["weights"][token, slot]) * (down @ inner)
                found = torch.from_numpy(check["expected"][token])
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_swiglu_does_not_overflow_for_large_gates() -> None:
    one = np.ones((1, 1), np.float32)
    out = swiglu_expert(200 * one, -one, one, one)
    assert out == pytest.approx(0)
