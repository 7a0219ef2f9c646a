"""GPUs where there are none."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from kt_kernel.host.gpus import count_gpus, find_gpu
from tests.kt_kernel.host.fake_machine import write

#: Attributes of a card, by their numbers in cuda.h; 102 is virtual memory.
CARD = {16: 132, 75: 9, 76: 0, 102: 1}


class Driver:
    """A driver with one card of these attributes; what else it is asked it does not tell."""

    def __init__(self, attributes: dict[int, int]) -> None:
        self.attributes = attributes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *_: 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: ctypes.c_int) -> int:
        if number not in self.attributes:
            return 1
        value._obj.value = self.attributes[number]
        return 0


@pytest.mark.parametrize(
    ("attributes", "able"),
    [(CARD, True), ({**CARD, 102: 0}, False), ({16: 80, 75: 7, 76: 0}, False)],
    ids=["card", "vgpu", "a driver that does not know"],
)
def test_attributes(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[int, int], able: bool
) -> None:
    monkeypatch.setattr("kt_kernel.host.gpus.ctypes.CDLL", lambda name: Driver(attributes))
    gpu, problem = find_gpu()
    assert problem == ""
    assert gpu is not None
    assert gpu.virtual_memory == able
    assert gpu.compute_capability == (attributes[75], attributes[76])
    assert gpu.multiprocessors == attributes[16]


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
