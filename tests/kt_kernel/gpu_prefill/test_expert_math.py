"""What the card computes of an expert, in plain PyTorch and by the Triton kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kt_kernel import _ext, packed
from kt_kernel.gpu_prefill import expert_math
from kt_kernel.gpu_prefill.expert_math import ExpertMatrices
from kt_kernel.gpu_prefill.packed_layer import packed_layer
from tests import reference
from tests.layers import shared_layer
from tests.shapes import LayerShape

SHAPE = LayerShape(2, 1, 128, 192)


def matrices(dtype: torch.dtype) -> ExpertMatrices:
    """Of the shape, with NaN where nothing has been written."""
    h, i = SHAPE.hidden_size, SHAPE.intermediate_size
    sizes = ((2 * i, h), (h, i), (2 * i,), (h,))
    made = (torch.full(size, torch.nan, dtype=torch.float32) for size in sizes)
    gate_up, down, gate_up_scale, down_scale = made
    return ExpertMatrices(gate_up.to(dtype), down.to(dtype), gate_up_scale, down_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [1, 2])
def test_unpacked_matrices_are_those_of_the_format(
    method: str, slices: int, dtype: torch.dtype
) -> None:
    """Every level and scale, exactly; levels fit bf16."""
    source = shared_layer(SHAPE)
    wrapper = source.wrapper(method, threadpool_count=slices)
    block_k = packed.METHODS[method].block_k
    tables = torch.from_numpy(np.array(_ext.int4_tables(method))) if block_k else None
    layer = packed_layer(0, wrapper._weights.layer.slices, np.ones(2, bool), tables)
    assert len(layer.slices) == slices
    slot = torch.empty(layer.slot_bytes, dtype=torch.uint8)
    for expert, want in source.packed(method).items():
        layer.copy(expert, slot)
        found = matrices(dtype)
        for where in layer.where:
            expert_math.unpack(slot, where, tables, block_k, found)
        gate_up = found.gate_up.double() * found.gate_up_scale.double()[:, None]
        down = found.down.double() * found.down_scale.double()[:, None]
        np.testing.assert_allclose(gate_up.numpy(), np.concatenate(want[:2]), rtol=1e-6)
        np.testing.assert_allclose(down.numpy(), want[2], rtol=1e-6)


def test_swiglu_of_a_product_with_its_scales() -> None:
    rng = np.random.default_rng(0)
    product = rng.standard_normal((5, 2 * 1100)).astype(np.float32) * 50
    scale = rng.random(2 * 1100).astype(np.float32)
    found = torch.empty(5, 1100)
    expert_math.swiglu(torch.from_numpy(product), torch.from_numpy(scale), found)
    gate, up = np.split(product.astype(np.float64) * scale, 2, axis=1)
    np.testing.assert_allclose(found.numpy(), reference.silu(gate) * up, rtol=1e-5, atol=1e-30)


def test_accumulated_rows_go_to_their_tokens() -> None:
    rng = np.random.default_rng(0)
    product = rng.standard_normal((3, 1100)).astype(np.float32)
    scale, weights = rng.random(1100).astype(np.float32), rng.random(3).astype(np.float32)
    tokens = np.array([4, 0, 2])
    before = rng.standard_normal((6, 1100)).astype(np.float32)
    found = torch.from_numpy(before.copy())
    y, of_rows, rows, factors = map(torch.from_numpy, (product, scale, tokens, weights))
    expert_math.accumulate(y, of_rows, rows, factors, found)
    want = before.astype(np.float64)
    want[tokens] += product.astype(np.float64) * scale * weights[:, None]
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="that is this one")
def test_the_triton_kernels_do_the_same() -> None:
    """The tests above, with Triton's interpreter in the place of PyTorch."""
    pytest.importorskip("triton", reason="Triton is missing: PyTorch for CUDA brings it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, str(Path(__file__))],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "14 passed, 1 skipped" in result.stdout
