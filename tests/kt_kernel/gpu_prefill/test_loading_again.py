"""Layers on the card that are loaded again, made again or gone: whose weights are computed."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kt_kernel import KTMoEWrapper
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill import staging, start
from kt_kernel.gpu_prefill.staging import HostRegister
from kt_kernel.gpu_prefill.streams import DirectStream
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
        self.gone = False

    def register(self, memory: NDArray[np.uint8]) -> None:
        begin = memory.ctypes.data
        if len(self.sizes) == self.most:
            raise RuntimeError("out of memory (CUDA error 2)")
        for other, size in self.sizes.items():
            if begin < other + size and other < begin + memory.nbytes:
                raise RuntimeError("already mapped (CUDA error 712)")
        self.sizes[begin] = memory.nbytes

    def unregister(self, memory: NDArray[np.uint8]) -> None:
        if self.gone:
            raise RuntimeError("driver shutting down (CUDA error 4)")
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


def with_a_layer_on_its_way(make: Make) -> tuple[KTMoEWrapper, list[KTMoEWrapper]]:
    """Two layers, after a call of the first; of the second, experts are on their way."""
    first, second = make(0), make(1)
    send(first, 6)
    first.forward(*batch())
    assert first.on_card is not None
    assert first.on_card.card._ring.on_the_way(1)
    return first, [second]


def test_a_layer_that_goes_leaves_the_card(make: Make, pages: Pages) -> None:
    """Else its weights stay in memory, and registered, for as long as the process runs."""
    first, second = with_a_layer_on_its_way(make)
    registered = len(pages.sizes)
    weights = weakref.ref(second[0]._weights.layer)
    assert first.on_card is not None
    card = first.on_card.card
    second.clear()
    assert list(card._layers) == [0]
    assert card._ring.on_the_way(1) == []
    assert len(pages.sizes) == registered / 2
    assert weights() is None
    assert difference(first.forward(*batch()), on_cpus(first, *batch())) < INT8_ERROR


def test_a_layer_may_go_in_the_middle_of_anothers_call(
    make: Make, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python collects it when it likes. It would wait for this call, which waits for it."""
    first, second = with_a_layer_on_its_way(make)
    registered = len(pages.sizes)
    assert first.on_card is not None
    want, found = first.forward(*batch()), []
    multiply = first.on_card.card._multiply

    def collect(*arguments: torch.Tensor) -> None:
        second.clear()
        assert len(pages.sizes) == registered
        multiply(*arguments)

    monkeypatch.setattr(first.on_card.card, "_multiply", collect)
    call = threading.Thread(target=lambda: found.append(first.forward(*batch())), daemon=True)
    call.start()
    call.join(60)
    assert found
    assert torch.equal(found[0], want)
    assert len(pages.sizes) == registered / 2


def test_a_layer_that_goes_waits_for_the_end_of_a_capture(
    make: Make, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA lets no thread wait for a stream while it captures: the graph would be lost."""
    captures: list[bool] = []
    monkeypatch.setattr(DirectStream, "may_finish", lambda _: not captures)
    first, second = with_a_layer_on_its_way(make)
    registered = len(pages.sizes)
    captures.append(True)
    second.clear()
    assert len(pages.sizes) == registered
    captures.clear()
    first.forward(*batch())
    assert len(pages.sizes) == registered / 2


def test_what_cuda_refuses_of_a_layer_that_goes_is_logged(
    make: Make, pages: Pages, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come to light in another layer's call, which has nothing to do with it.

    The weights stay: if they were freed, the card would take what is mapped there next for them.
    """
    monkeypatch.setattr(staging, "_still_registered", [])
    first, second = with_a_layer_on_its_way(make)
    weights = weakref.ref(second[0]._weights.layer)
    want = first.forward(*batch())
    pages.gone = True
    second.clear()
    assert "layer 1 is gone, and its memory stays registered with CUDA: driver" in caplog.text
    for record in caplog.records:
        record.args = ()  # the error's traceback holds the memory
    gc.collect()
    assert weights() is not None
    assert torch.equal(first.forward(*batch()), want)


def test_a_layer_that_goes_in_a_forked_process_stays_the_parents(make: Make) -> None:
    """The child has no card: no stream can be waited for there."""
    first, second = with_a_layer_on_its_way(make)
    assert first.on_card is not None
    child = os.fork()
    if child == 0:
        second.clear()
        os._exit(list(first.on_card.card._layers) != [0, 1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
