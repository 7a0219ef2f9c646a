"""Experts that SGLang keeps for itself, computed in torch."""

import pytest
import torch

from kt_kernel.sglang_plugin.cpu_mode.experts import resident_experts_output

TOKENS, HIDDEN, INTERMEDIATE = 6, 32, 16


def one_by_one(
    w13: torch.Tensor, w2: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if not 0 <= expert < w13.shape[0]:
                continue
            gate = w13[expert, :INTERMEDIATE].double() @ x[token].double()
            up = w13[expert, INTERMEDIATE:].double() @ x[token].double()
            down = w2[expert].double() @ (gate / (1 + torch.exp(-gate)) * up)
            output[token] += down * weights[token, slot].double()
    return output


@pytest.mark.parametrize("resident", [0, 1, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_only_resident_experts_contribute(
    resident: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(resident)
    w13 = torch.randn(resident, 2 * INTERMEDIATE, HIDDEN, generator=generator).to(dtype) / 4
    w2 = torch.randn(resident, HIDDEN, INTERMEDIATE, generator=generator).to(dtype) / 4
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    # Padding (-1), experts of kt_kernel, a token with the same expert twice.
    ids = torch.tensor(
        [[0, 1, 9], [-1, -1, -1], [3, 9, 8], [2, 2, 0], [9, 8, 7], [0, 5, 3]], dtype=torch.int32
    )
    weights = torch.rand(ids.shape, generator=generator)
    before = x.clone(), ids.clone()

    output = resident_experts_output(w13, w2, x, ids, weights)

    expected = one_by_one(w13, w2, x, ids, weights)
    assert output.dtype == dtype
    largest = float(expected.abs().max())
    assert torch.allclose(output.double(), expected, atol=tolerance * max(1, largest))
    assert torch.equal(x, before[0])
    assert torch.equal(ids, before[1])


def test_no_tokens() -> None:
    output = resident_experts_output(
        torch.ones(2, 2 * INTERMEDIATE, HIDDEN),
        torch.ones(2, HIDDEN, INTERMEDIATE),
        torch.ones(0, HIDDEN),
        torch.ones(0, 3, dtype=torch.int32),
        torch.ones(0, 3),
    )
    assert output.shape == (0, HIDDEN)
