"""Streams of a device, as far as this package uses them: work in order, and marks to wait for.

``CudaStream`` is a CUDA stream. On the CPU, for tests and for a machine without a card, everything
happens when it is asked for, so ``DirectStream`` has nothing to wait for. Tests have a third kind
that runs on threads of its own and loses no chance to run things too early.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from kt_kernel.errors import UserError
from kt_kernel.stream import cuda_runtime_path

#: cudaStreamCaptureModeRelaxed
_RELAXED = 2


@functools.cache
def _runtime() -> Any:
    """CUDA's, None where PyTorch links it in such a way that it cannot be found."""
    try:
        return ctypes.CDLL(cuda_runtime_path())
    except UserError:
        return None


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Lets this thread wait for a stream that nobody captures while another thread captures one.

    By default CUDA refuses that, and the other thread's graph is lost.

    Raises:
        RuntimeError: CUDA refuses.
    """
    if (runtime := _runtime()) is None:
        yield
        return
    exchange = runtime.cudaThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_RELAXED)
    error = exchange(ctypes.byref(mode))
    if error:
        raise RuntimeError(f"cudaThreadExchangeStreamCaptureMode failed (CUDA error {error})")
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))  # now the one before


class Stream(Protocol):
    """Runs what it is given in order, some time later."""

    def run(self, work: Callable[[], object]) -> None:
        """Put work on the stream."""

    def mark(self, timed: bool = False) -> Any:
        """Something to wait for: all that is on the stream by now has been done."""

    def wait(self, mark: Any) -> None:
        """What comes after this on the stream runs after what came before the mark on its own."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Between two marks, the second of this stream; None before it is reached."""

    def hand_over(self) -> None:
        """The device's current stream goes on after what is on the stream."""

    def finish(self) -> None:
        """Wait here until the stream is empty."""

    def may_finish(self) -> bool:
        """Whether this thread captures no stream: while it does, it may wait for none."""


class DirectStream:
    """At once, in the calling thread."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def mark(self, timed: bool = False) -> float:
        return time.perf_counter()

    def wait(self, mark: Any) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float | None:
        return end - begin

    def hand_over(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def may_finish(self) -> bool:
        return True


class CudaStream:
    """A CUDA stream; None is whatever stream is the current one at the time."""

    def __init__(self, stream: torch.cuda.Stream | None, device: torch.device) -> None:
        self._own, self._device = stream, device

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream(self._device)

    def run(self, work: Callable[[], object]) -> None:
        if self._own is None:
            work()
            return
        with torch.cuda.stream(self._own):
            work()

    def mark(self, timed: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1e3 if end.query() else None

    def hand_over(self) -> None:
        if self._own is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._own)

    def finish(self) -> None:
        # A finalizer's work may be done while another thread captures.
        with relaxed_capture():
            self._stream.synchronize()

    def may_finish(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()
