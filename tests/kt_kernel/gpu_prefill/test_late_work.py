"""What a finalizer has put off, done by another thread while the first still captures."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kt_kernel.gpu_prefill import streams
from kt_kernel.gpu_prefill.lock import LateLock
from kt_kernel.gpu_prefill.streams import CudaStream

GLOBAL, RELAXED = 0, 2


class Cuda:
    """As CUDA: while any thread captures, only those in relaxed mode may wait for a stream."""

    def __init__(self) -> None:
        self.capturing: set[int] = set()  # threads
        self.modes: dict[int, int] = {}
        self.waits: list[int] = []  # threads

    def cudaThreadExchangeStreamCaptureMode(self, pointer: Any) -> int:
        mode, thread = pointer._obj, threading.get_ident()
        before = self.modes.get(thread, GLOBAL)
        self.modes[thread], mode.value = mode.value, before
        return 0

    def synchronize(self) -> None:
        thread = threading.get_ident()
        if self.capturing and self.modes.get(thread, GLOBAL) != RELAXED:
            raise RuntimeError("operation not permitted when stream is capturing (CUDA error 900)")
        self.waits.append(thread)


def test_another_thread_does_late_work_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wait is no part of the capture, and its mode is the one before afterwards."""
    cuda = Cuda()
    monkeypatch.setattr(streams, "_runtime", lambda: cuda)
    own = cast(torch.cuda.Stream, SimpleNamespace(synchronize=cuda.synchronize))
    stream = CudaStream(own, torch.device("cpu"))
    lock = LateLock(lambda: threading.get_ident() not in cuda.capturing)
    refused: list[str] = []

    def work() -> None:
        try:
            stream.finish()
        except RuntimeError as error:
            refused.append(str(error))

    def call() -> None:
        with lock:
            pass

    cuda.capturing.add(threading.get_ident())
    lock.when_free(work)
    assert not cuda.waits
    assert not refused
    other = threading.Thread(target=call)
    other.start()
    thread = other.ident
    other.join(60)
    assert refused == []
    assert cuda.waits == [thread]
    assert set(cuda.modes.values()) == {GLOBAL}
