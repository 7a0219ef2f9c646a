"""Layers whose calls card and CPUs divide, with the CPU in the card's place: what tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel import KTMoEWrapper, packed
from kt_kernel.gpu_prefill.costs import Costs

LAYOUT = packed.PackedLayout(6, 128, 128, "int4")
TOP_K, TOKENS = 3, 24
#: What int8 activations of the CPUs' part cost, relative to the mean.
INT8_ERROR = 0.02

#: The fixture ``make``.
Make = Callable[..., KTMoEWrapper]


class FirstMost(Costs):
    """Sends so many experts, those with the most tokens, whatever they cost."""

    count = 0

    def choose(
        self, tokens: NDArray[np.int64], may_stream: NDArray[np.bool_], there: list[int]
    ) -> list[int]:
        ready = [e for e in there if tokens[e]][: self.count]
        rest = [e for e in np.argsort(-tokens, kind="stable").tolist() if e not in ready]
        return ready + [e for e in rest if tokens[e] and may_stream[e]][: self.count - len(ready)]


def send(wrapper: KTMoEWrapper, count: int) -> None:
    """From now on the card computes so many experts."""
    assert wrapper.on_card is not None
    costs = FirstMost(1, 1, 1, measured=True)
    costs.count = count
    wrapper.on_card.card.costs = costs


@functools.cache
def batch(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, LAYOUT.hidden_size, generator=generator)
    ids = torch.rand(tokens, LAYOUT.num_experts, generator=generator).topk(TOP_K).indices
    ids[0, 0] = ids[5] = -1
    return x, ids.int(), torch.rand(tokens, TOP_K, generator=generator)


def on_cpus(
    wrapper: KTMoEWrapper, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same without the card."""
    return wrapper.without_deferral().forward(x, ids, weights)


def difference(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).abs().mean() / want.abs().mean())
