"""Layers on the card that are loaded again, or made again: whose weights are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kt_kernel import KTMoEWrapper
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill import start
from kt_kernel.gpu_prefill.staging import HostRegister
from tests.kt_kernel.gpu_prefill.divided_calls import (
    INT8_ERROR,
    LAYOUT,
    Make,
    batch,
    difference,
    on_cpus,
    send,
)


class Pages:
    """What is registered, by address. As CUDA, it refuses what is already, and to register more."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.most = 100

    def register(self, memory: NDArray[np.uint8]) -> None:
        begin = memory.ctypes.data
        if len(self.sizes) == self.most:
            raise RuntimeError("out of memory (CUDA error 2)")
        for other, size in self.sizes.items():
            if begin < other + size and other < begin + memory.nbytes:
                raise RuntimeError("already mapped (CUDA error 712)")
        self.sizes[begin] = memory.nbytes

    def unregister(self, memory: NDArray[np.uint8]) -> None:
        assert self.sizes.pop(memory.ctypes.data) == memory.nbytes


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    made = Pages()
    monkeypatch.setattr(
        start, "registering", lambda _: HostRegister(made.register, made.unregister)
    )
    return made


def reversed_experts(wrapper: KTMoEWrapper) -> None:
    """Load the layer's file with its experts the other way round."""
    wrapper.load_weights(torch.arange(LAYOUT.num_experts).flip(0))


def test_weights_loaded_again_are_those_of_the_next_calls(make: Make, pages: Pages) -> None:
    """Into the same memory, while experts of the old ones are on their way to the card."""
    fresh = make(1)
    reversed_experts(fresh)
    send(fresh, 6)
    want = fresh.forward(*batch())
    del fresh
    start.card_experts.cache_clear()
    start.registration.cache_clear()

    first, second = make(0), make(1)
    assert first.on_card is not None
    send(first, 6)
    registered = dict(pages.sizes)
    first.forward(*batch())
    assert first.on_card.card._ring.on_the_way(1)
    reversed_experts(second)
    assert pages.sizes == registered
    layers = first.on_card.card._layers
    assert not any(layer.staged for layer in layers.values())
    assert torch.equal(second.forward(*batch()), want)


@pytest.mark.parametrize("how", ["a load that fails", "tensors"])
def test_weights_that_change_leave_the_card_first(make: Make, pages: Pages, how: str) -> None:
    """Nothing reads the memory that is written to, and the card computes no old weights later."""
    first, second = make(0), make(1)
    registered = len(pages.sizes)
    send(first, 6)
    first.forward(*batch())
    if how == "tensors":
        shape = LAYOUT.num_experts, 128, 128
        gate, up, down = (torch.full(shape, 0.01) for _ in range(3))
        second.load_weights_from_tensors(gate, up, down, torch.arange(LAYOUT.num_experts))
    else:
        second.weight_path = "/nowhere"
        with pytest.raises(UserError, match="weight path /nowhere does not exist"):
            reversed_experts(second)
    assert len(pages.sizes) == registered / 2
    assert torch.equal(second.forward(*batch()), on_cpus(second, *batch()))


def test_a_layer_made_again_leaves_the_card_to_the_new_one(make: Make, pages: Pages) -> None:
    """Calls of the old one stay with the CPUs: the card would compute them with other weights."""
    first, old = make(0), make(1)
    pages.most = registered = len(pages.sizes)  # no room for both
    send(first, 6)
    first.forward(*batch())
    new = make(1)
    reversed_experts(new)
    assert new.on_card is not None
    assert not new.on_card._layer.staged
    assert len(pages.sizes) == registered
    for wrapper in (old, new, old):
        assert difference(wrapper.forward(*batch()), on_cpus(wrapper, *batch())) < INT8_ERROR
    assert torch.equal(old.forward(*batch()), on_cpus(old, *batch()))
    # What is the new one's stays there when the old one is loaded again from tensors.
    card = new.on_card.card
    old._calls.leave_card()
    assert card.has(new.on_card._layer)
    assert len(pages.sizes) == registered
