"""Divided calls whose experts go to the card through staging buffers."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kt_kernel import KTMoEWrapper
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill import start
from kt_kernel.gpu_prefill.staging import STAGING_VARIABLE, HostRegister, StagedRows
from tests.kt_kernel.gpu_prefill.divided_calls import Make, batch, send


def run_all(wrappers: list[KTMoEWrapper]) -> list[torch.Tensor]:
    """Outputs of three passes, with four experts of each call on the card."""
    send(wrappers[0], 4)
    return [wrapper.forward(*batch()) for _ in range(3) for wrapper in wrappers]


@pytest.mark.parametrize("registered", [0, 1, 3], ids=["nothing", "a slice", "a layer and a half"])
def test_memory_that_cannot_be_registered_gives_the_same_bits(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    registered: int,
) -> None:
    """And the log says once, when all layers are there, how much of it there is."""
    want = run_all([make(idx) for idx in range(3)])
    start.card_experts.cache_clear()
    start.registration.cache_clear()
    left = iter(range(registered))

    def register(_: NDArray[np.uint8]) -> None:
        if next(left, None) is None:
            raise RuntimeError("out of memory (CUDA error 2)")

    cuda = HostRegister(register, lambda _: None)
    monkeypatch.setattr(start, "registering", lambda _: cuda)
    with caplog.at_level("INFO"):
        wrappers = [make(idx) for idx in range(3)]
    assert wrappers[0].on_card is not None
    layers = wrappers[0].on_card.card._layers
    assert sum(len(layer.staged) for layer in layers.values()) == 6 - registered
    for found, wanted in zip(run_all(wrappers), want, strict=True):
        assert torch.equal(found, wanted)
    assert caplog.text.count("CUDA registered ") == 1
    assert "refused the other" in caplog.text
    assert ("GB/s through staging buffers" in caplog.text) == (registered < 2)


def test_a_copy_that_fails_is_told_and_leaves_later_calls_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STAGING_VARIABLE, "1")
    wrapper = make()
    send(wrapper, 4)
    want = wrapper.forward(*batch())
    calls = iter(range(100))
    copy = StagedRows.copy

    def failing(self: StagedRows, row: torch.Tensor, target: torch.Tensor) -> None:
        if next(calls) == 3:  # the second slice of the second expert
            raise RuntimeError("the bus is gone")
        copy(self, row, target)

    with monkeypatch.context() as patch:
        patch.setattr(StagedRows, "copy", failing)
        with pytest.raises(RuntimeError, match="the bus is gone"):
            wrapper.forward(*batch())
    for _ in range(3):
        assert torch.equal(wrapper.forward(*batch()), want)


def test_a_forked_process_is_refused_and_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the threads that fill the buffers: a call would wait for ever."""
    monkeypatch.setenv(STAGING_VARIABLE, "1")
    wrapper = make()
    send(wrapper, 4)
    child = os.fork()
    if child == 0:
        try:
            wrapper.forward(*batch())
        except UserError:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
