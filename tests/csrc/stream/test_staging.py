"""Copies through staging buffers, on the stand-in for the CUDA runtime."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kt_kernel import _ext
from kt_kernel.gpu_prefill.staging import StagingBuffers
from kt_kernel.host.cpus import allowed_cpus
from tests.csrc.stream import fake_cuda
from tests.csrc.stream.fake_cuda import Array, Stream

CPUS = [cpu.id for cpu in allowed_cpus()]
#: Three threads on two buffers: some wait for a turn in the same one.
THREADS, BUFFERS, BYTES = 3, 2, 1000
SIZES = [1, BYTES - 1, BYTES, BYTES + 1, 2 * BYTES, 7 * BYTES + 3]


@pytest.fixture
def context() -> _ext.StreamContext:
    return _ext.StreamContext(fake_cuda.library()._name)


@pytest.fixture
def staging(context: _ext.StreamContext) -> _ext.Staging:
    return _ext.Staging(context, CPUS, THREADS, BUFFERS, BYTES)


def memory(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, size, np.uint8)


def room(size: int) -> Array:
    return Array(np.zeros(size, np.uint8))


def test_bytes_arrive_where_they_belong(staging: _ext.Staging, stream: Stream) -> None:
    """Pieces that are filled in before the one before has left would mix the copies up."""
    fake_cuda.library().fake_set_delay(200)
    copies = [(memory(size, seed), room(size)) for seed in range(20) for size in SIZES]
    for source, target in copies:
        staging.copy(source, target.address, stream.handle)
    stream.synchronize()
    for source, target in copies:
        assert np.array_equal(target.numpy(), source)


def test_without_a_runtime_they_are_there_at_once() -> None:
    staging = _ext.Staging(None, CPUS, THREADS, BUFFERS, BYTES)
    for size in SIZES:
        source, target = memory(size), np.zeros(size, np.uint8)
        staging.copy(source, target.ctypes.data, 0)
        assert np.array_equal(target, source)


def test_nothing_waits_and_nothing_comes_early(staging: _ext.Staging, stream: Stream) -> None:
    """More than all buffers hold, on a stream that stands still; the slot is still in use there."""
    source, target = memory(9 * BYTES), room(9 * BYTES)
    stream.hold()
    staging.copy(source, target.address, stream.handle)
    assert not target.numpy().any()
    stream.release()
    stream.synchronize()
    assert np.array_equal(target.numpy(), source)


def test_what_follows_on_the_stream_finds_all_of_it(staging: _ext.Staging, stream: Stream) -> None:
    for seed in range(20):
        source, target, after = memory(5 * BYTES, seed), room(5 * BYTES), room(5 * BYTES)
        staging.copy(source, target.address, stream.handle)
        stream.copy(after, target)
        stream.synchronize()
        assert np.array_equal(after.numpy(), source)


@pytest.mark.parametrize("fails", ["host function", "copy"])
def test_a_refusal_in_the_middle_is_told_and_the_next_copies_are_whole(
    staging: _ext.Staging, stream: Stream, fails: str
) -> None:
    """More often than there are buffers: one that a failed copy kept would be waited for."""
    for seed in range(3 * BUFFERS):
        broken = memory(4 * BYTES)
        if fails == "copy":  # there is room for the first piece
            to = room(BYTES).address
            what = "cudaMemcpyAsync to the device failed: invalid argument"
        else:
            to = room(4 * BYTES).address
            fake_cuda.library().fake_fail_next(1)
            what = "cudaLaunchHostFunc failed: invalid argument"
        with pytest.raises(RuntimeError, match=what):
            staging.copy(broken, to, stream.handle)
        source, target = memory(3 * BYTES, seed), room(3 * BYTES)
        staging.copy(source, target.address, stream.handle)
        stream.synchronize()
        assert np.array_equal(target.numpy(), source)


class Unread:
    """Bytes whose pages come into being when they are read."""

    def __init__(self, size: int) -> None:
        self._descriptor = os.memfd_create("source")
        os.truncate(self._descriptor, size)
        self.bytes = np.frombuffer(mmap.mmap(self._descriptor, size), np.uint8)

    def read(self) -> int:
        """How many have been."""
        return 512 * os.fstat(self._descriptor).st_blocks

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.mark.parametrize("held", [False, True], ids=["while it is read", "before it is read"])
def test_nothing_reads_the_source_of_a_failed_copy(
    context: _ext.StreamContext, stream: Stream, held: bool
) -> None:
    """Its memory may be freed then. Pages take the time here that makes the reading last."""
    size = 4 << 20
    staging = _ext.Staging(context, CPUS, THREADS, BUFFERS, size)
    before, target = memory(BUFFERS * size), room(BUFFERS * size)
    if held:  # the buffers are full, so the pieces that fail wait for their turn
        stream.hold()
        staging.copy(before, target.address, stream.handle)
    source = Unread(2 * size)
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync to the device failed"):
        staging.copy(source.bytes, room(size).address, stream.handle)  # has room for one piece
    found = source.read()
    if held:
        assert found == 0
        stream.release()
        stream.synchronize()
        assert np.array_equal(target.numpy(), before)
    staging.copy(before, target.address, stream.handle)  # in the buffers of the pieces that failed
    stream.synchronize()
    assert np.array_equal(target.numpy(), before)
    assert source.read() == found
    source.close()


def test_another_stream_may_go_on_where_one_has_ended(
    staging: _ext.Staging, stream: Stream
) -> None:
    """The costs are measured on a stream; the last buffer filled there is free again."""
    other = Stream()
    for seed, each in enumerate((stream, other, stream)):
        source, target = memory(6 * BYTES, seed), room(6 * BYTES)
        staging.copy(source, target.address, each.handle)
        each.synchronize()
        assert np.array_equal(target.numpy(), source)
    other.close()


def copying_threads() -> int:
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("kt-copy-") for name in names)


def test_the_threads_end_with_it_whatever_is_left_to_do(
    context: _ext.StreamContext, stream: Stream
) -> None:
    before = copying_threads()
    staging = _ext.Staging(context, CPUS, THREADS, BUFFERS, BYTES)
    assert copying_threads() == before + THREADS
    source, target = memory(9 * BYTES), room(9 * BYTES)
    stream.hold()
    staging.copy(source, target.address, stream.handle)
    del staging
    assert copying_threads() == before
    stream.release()
    stream.synchronize()  # does not wait for what nobody fills


def test_buffers_that_cannot_be_had(context: _ext.StreamContext, stream: Stream) -> None:
    """Where even these may not be pinned, the driver copies the experts; a reason is kept."""
    buffers = StagingBuffers(context, [CPUS])
    stream.begin_capture()
    try:
        assert buffers.of(0) is None
    finally:
        stream.end_capture()
    assert buffers.refusal.startswith("cudaHostAlloc failed: operation not permitted")
    assert buffers.of(0) is None
    assert buffers.of(1) is not None
