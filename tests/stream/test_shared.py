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
from tests.layers import RandomLayer, random_batch
from tests.shapes import LAYERS
from tests.stream import fake_cuda
from tests.stream.fake_cuda import Array, Stream

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
    on_stream, cuda = _ext.StreamLayer(context, layer._layer, 3), Stream()
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
