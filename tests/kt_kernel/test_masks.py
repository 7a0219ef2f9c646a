"""generate_gpu_experts_masks."""

from __future__ import annotations

import pytest
import torch

from kt_kernel import generate_gpu_experts_masks
from kt_kernel.errors import UserError


def test_most_frequent_over_all_layers() -> None:
    frequency = torch.tensor([[0.1, 0.5, 0.3, 0.8], [0.2, 0.4, 0.9, 0.1]])
    mask = generate_gpu_experts_masks(frequency, 3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, True, False, True], [False, False, True, False]]


def test_ties_go_to_the_first() -> None:
    assert generate_gpu_experts_masks(torch.ones(2, 2, dtype=torch.int64), 3).tolist() == [
        [True, True],
        [True, False],
    ]


@pytest.mark.parametrize(("asked", "marked"), [(-1, 0), (0, 0), (8, 8), (100, 8)])
def test_counts_are_clamped(asked: int, marked: int) -> None:
    assert int(generate_gpu_experts_masks(torch.rand(2, 4), asked).sum()) == marked


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match=r"activation_freq has shape \[8\]"):
        generate_gpu_experts_masks(torch.rand(8), 1)
    with pytest.raises(UserError, match="activation_freq has a NaN"):
        generate_gpu_experts_masks(torch.full((2, 4), torch.nan), 1)
    with pytest.raises(UserError, match=r"num_gpu_experts is 1\.5: expected an integer"):
        generate_gpu_experts_masks(torch.rand(2, 4), 1.5)  # type: ignore[arg-type]
