"""Memory that a stand-in for the CUDA runtime registers for the card."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kt_kernel import _ext
from kt_kernel.gpu_prefill.packed_layer import packed_layer
from kt_kernel.gpu_prefill.staging import Registration, StagingBuffers, registering
from kt_kernel.host.cpus import allowed_cpus
from tests.csrc.stream import fake_cuda
from tests.csrc.stream.fake_cuda import Stream

EXPERTS, HIDDEN, INNER = 6, 256, 64
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


def test_a_layer_goes_unregistered(context: _ext.StreamContext) -> None:
    """One made in its place may get the same addresses, and is registered all the same."""
    before = registered()
    held = np.array([True, True, False, True, False, True])
    source = [e if here else -1 for e, here in enumerate(held)]
    shapes = (EXPERTS, INNER, HIDDEN), (EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    weights = [np.ones(shape, np.float32) for shape in shapes]
    engine = _ext.Engine([[CPU]], 1, "scalar")
    registration = Registration(registering(context))
    buffers = StagingBuffers(context, [[CPU]])
    for _ in range(3):
        layer = _ext.Layer(engine, EXPERTS, 2, HIDDEN, INNER, "int8")
        layer.load_matrices(weights, "fp32", source)
        packed = packed_layer(0, layer.slices, held, None)
        kept, staged = registration.add(packed.slices, held, buffers)
        assert (staged, registration.refusal) == ({}, "")
        assert registered() - before == 4 * packed.slices[0].shape[1]
        del layer, packed, kept
        assert registered() == before
