"""Outputs in memory that a stand-in for the CUDA runtime registers."""

from __future__ import annotations

import gc

import numpy as np

from kt_kernel import _ext
from kt_kernel.host.cpus import allowed_cpus
from tests.csrc.stream import fake_cuda

#: Bytes from which on memory is kept, and so pinned.
LEAST = 128 << 10


def registered() -> int:
    return int(fake_cuda.library().fake_registered())


def make() -> tuple[_ext.StreamContext, _ext.Engine]:
    context = _ext.StreamContext(fake_cuda.library()._name)
    engine = _ext.Engine([[allowed_cpus()[0].id]], 1, "scalar")
    return context, engine


def test_memory_is_registered_once_and_goes_unregistered() -> None:
    before = registered()
    context, engine = make()
    loose = engine.take_buffer(LEAST)
    assert registered() == before
    context.pin_outputs(engine)
    engine.take_buffer(LEAST - 1)
    assert registered() == before
    first = engine.take_buffer(4 * LEAST)
    size = registered() - before
    assert size >= 4 * LEAST
    del first, loose
    again = engine.take_buffer(4 * LEAST)
    assert registered() - before == size
    other = engine.take_buffer(4 * LEAST)
    assert registered() - before > size
    # A larger one takes the place of what is free, whose registration ends before its memory does.
    del other
    larger = engine.take_buffer(64 * LEAST)
    assert registered() - before >= size + 64 * LEAST
    del again, larger, context, engine
    gc.collect()
    assert registered() == before


def test_memory_that_cannot_be_registered_serves_all_the_same() -> None:
    before = registered()
    context, engine = make()
    context.pin_outputs(engine)
    fake_cuda.library().fake_fail_next(1)
    memory = engine.take_buffer(LEAST)
    assert registered() == before
    memory[:] = 7
    assert np.all(memory == 7)
    # It is tried again at its next use.
    del memory
    engine.take_buffer(LEAST)
    assert registered() > before
