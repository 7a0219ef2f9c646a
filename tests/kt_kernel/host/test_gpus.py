"""GPUs where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_kernel.host.gpus import count_gpus, find_gpu
from tests.kt_kernel.host.fake_machine import write


def test_gpu_files_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("kt_kernel.host.gpus.ctypes.CDLL", no_library)
    assert find_gpu(tmp_path) == (None, "")
    write(tmp_path, {"dev/nvidia0": ""})
    gpu, problem = find_gpu(tmp_path)
    assert gpu is None
    assert "libcuda.so.1 is missing" in problem
    assert count_gpus() == 0
