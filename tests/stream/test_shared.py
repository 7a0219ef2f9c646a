"""What the layers' calls share: finding the runtime, and the thread that watches."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kt_kernel.errors import UserError
from kt_kernel.stream import cuda_runtime_path, watch

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
    assert "layer 3: not finished after 5 s: outputs are NaN from here on" in caplog.text
