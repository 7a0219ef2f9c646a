"""Memory that a stand-in for the CUDA runtime registers for the card."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kt_kernel import _ext
from kt_kernel.host.cpus import allowed_cpus
from tests.csrc.stream import fake_cuda
from tests.csrc.stream.fake_cuda import Stream

CPU = allowed_cpus()[0].id


@pytest.fixture
def context() -> _ext.StreamContext:
    return _ext.StreamContext(fake_cuda.library()._name)


@pytest.fixture
def capturing() -> Iterator[None]:
    stream = Stream()
    stream.begin_capture()
    yield
    stream.end_capture()
    stream.close()


def registered() -> int:
    return int(fake_cuda.library().fake_registered())


def test_what_is_registered_already_is_refused(context: _ext.StreamContext) -> None:
    """Whoever registered it may end that, and a part of it does not stand for the rest."""
    memory = np.zeros(3000, np.uint8)
    before = registered()
    context.register_memory(memory[1000:2000])
    for part in (memory[1000:2000], memory, memory[:1001], memory[1999:]):
        with pytest.raises(RuntimeError, match=r"cudaHostRegister failed: .* \(CUDA error 712\)"):
            context.register_memory(part)
    context.unregister_memory(memory[1000:2000])
    assert registered() == before
    context.register_memory(memory)
    context.unregister_memory(memory)
    assert registered() == before


def test_what_is_not_registered_is_told(context: _ext.StreamContext) -> None:
    memory = np.zeros(100, np.uint8)
    context.register_memory(memory)
    refused = r"cudaHostUnregister failed: .* \(CUDA error 713\)"
    with pytest.raises(RuntimeError, match=refused):
        context.unregister_memory(memory[1:])
    context.unregister_memory(memory)
    with pytest.raises(RuntimeError, match=refused):
        context.unregister_memory(memory)


def test_memory_may_go_while_a_graph_is_captured(
    context: _ext.StreamContext, request: pytest.FixtureRequest
) -> None:
    """Python may collect it at any time; else it would go and stay registered."""
    before = registered()
    memory = np.zeros(100, np.uint8)
    context.register_memory(memory)
    engine = _ext.Engine([[CPU]], 1, "scalar")
    context.pin_outputs(engine)
    output = engine.take_buffer(1 << 20)
    assert registered() > before + 100
    request.getfixturevalue("capturing")
    context.unregister_memory(memory)
    del output, engine
    assert registered() == before
