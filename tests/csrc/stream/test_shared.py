"""What the layers' calls share: finding the runtime, and the thread that watches."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from kt_kernel import _ext, stream
from kt_kernel.errors import UserError
from kt_kernel.stream import cuda_runtime_path, watch
from tests.csrc.stream import fake_cuda
from tests.csrc.stream.fake_cuda import Array, Stream
from tests.layers import RandomLayer, random_batch
from tests.shapes import LAYERS

MAPS = """\
7f00-7f01 r--p 00000000 08:01 12 /usr/lib/x86_64-linux-gnu/libc.so.6
7f02-7f03 r-xp 00000000 08:01 13 /opt/venv/lib/nvidia/cu13/lib/libcudart.so.13
7f04-7f05 rw-p 00000000 00:00 0
"""


def test_the_runtime_that_is_loaded(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    assert cuda_runtime_path(maps) == "/opt/venv/lib/nvidia/cu13/lib/libcudart.so.13"
    maps.write_text(MAPS.replace("libcudart", "libcuda"))
    with pytest.raises(UserError, match=r"no libcudart\.so is loaded"):
        cuda_runtime_path(maps)


class Context:
    """Fails after two checks."""

    def __init__(self) -> None:
        self.limits: list[float] = []

    @property
    def failure(self) -> str:
        return "layer 3: not finished after 5 s" if len(self.limits) == 2 else ""

    def end_overdue(self, seconds: float) -> None:
        self.limits.append(seconds)


def test_the_first_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    context = Context()
    with caplog.at_level(logging.CRITICAL):
        # What it needs of the extension's class.
        watch(context, limit=5, interval=0)  # type: ignore[arg-type]
    assert context.limits == [5, 5]
    assert "layer 3: not finished after 5 s: an output is wrong from there on" in caplog.text


class Clock:
    """Time that passes in ``sleep`` only: as long as asked for, or as long as ``slept`` says."""

    def __init__(self, slept: list[float]) -> None:
        self.slept = slept
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += self.slept.pop(0) if self.slept else seconds


def test_calls_of_a_frozen_process_get_the_time_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped for 400 s with a call in flight, which has 300 s to compute."""
    context = Context()
    monkeypatch.setattr(Context, "failure", property(lambda c: "x" if len(c.limits) > 1200 else ""))
    monkeypatch.setattr(stream, "time", Clock([1.0, 401.0, 1.0, 101.0]))
    watch(context, limit=300, interval=1)  # type: ignore[arg-type]
    # Twice in one call's time: its own start is not known here, so the sum is.
    assert context.limits[:5] == [300, 300, 700, 700, 800]
    # A call that began before is over by then, or hangs.
    assert context.limits[-1] == 300
    assert context.limits.index(300, 5) > 700


def test_a_busy_machine_is_no_frozen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context()
    monkeypatch.setattr(Context, "failure", property(lambda c: "x" if len(c.limits) > 50 else ""))
    monkeypatch.setattr(stream, "time", Clock([20.0] * 50))
    watch(context, limit=300, interval=1)  # type: ignore[arg-type]
    assert set(context.limits) == {300}


def test_what_a_graph_cannot_raise_the_next_call_of_any_layer_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An id that is none, in a call on a stream: named once in the log."""
    monkeypatch.setattr(stream, "cuda_runtime_path", lambda: fake_cuda.library()._name)
    monkeypatch.setattr(stream, "_contexts", [])
    context = stream.stream_context.__wrapped__()
    layer, other = (RandomLayer(LAYERS[0], seed).wrapper("int8") for seed in (0, 1))
    batch = random_batch(LAYERS[0], 2)
    other.forward(*batch)
    x, ids, weights = (Array(t.numpy()) for t in batch)
    ids.numpy()[1, 1] = 99
    on_stream, cuda = _ext.StreamLayer(context, layer._weights.layer, 3), Stream()
    on_stream.submit(cuda.handle, x.address, "fp32", 2, ids.address, False, weights.address)
    on_stream.sync(cuda.handle, x.address)
    cuda.synchronize()
    cuda.close()
    assert np.isfinite(x.numpy()).all()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="layer 3: expert id 99 of token 1 is outside"):
            other.submit_forward(*batch)
    for thread in threading.enumerate():
        if thread.name == "kt-watch":
            thread.join(30)
    assert caplog.text.count("layer 3: expert id 99 of token 1 is outside [0, 8)") == 1
