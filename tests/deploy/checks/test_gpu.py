"""Checks of the GPU on made-up machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.checks import gpu as checks_gpu
from deploy.checks.result import Status
from kt_kernel.host.gpus import Gpu
from tests.deploy.checks.situations import one, situation
from tests.deploy.helpers import H200, L20, LAPTOP, with_gpu
from tests.kt_kernel.host.fake_machine import GIB

T4 = Gpu("Tesla T4", 16 * GIB, (7, 5), (12, 2), driver="535.1")


def test_compute_capability(tmp_path: Path) -> None:
    check = checks_gpu.check_compute_capability
    assert one(check, tmp_path).status is Status.PASS
    result = one(check, tmp_path, with_gpu(T4))
    assert (result.status, result.found) == (Status.FAIL, "7.5, Tesla T4")
    assert list(check(situation(tmp_path, LAPTOP))) == []
    assert list(check(situation(tmp_path, with_gpu(T4), KT_DEVICE="cpu"))) == []


def test_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.checks.gpu.torch_cuda_version", lambda: (13, 0))
    check = checks_gpu.check_driver
    assert one(check, tmp_path, with_gpu(H200)).status is Status.PASS
    result = one(check, tmp_path, with_gpu(T4))
    assert (result.status, result.found) == (Status.FAIL, "one for CUDA 12.2 (version 535.1)")
    assert "as the installed torch is built for 13.0" in result.expected
    # Minor versions are compatible: a driver for 13.0 runs what is built for 13.1.
    monkeypatch.setattr("deploy.checks.gpu.torch_cuda_version", lambda: (13, 1))
    assert one(check, tmp_path, with_gpu(H200)).status is Status.PASS
    monkeypatch.setattr("deploy.checks.gpu.torch_cuda_version", lambda: None)
    assert list(check(situation(tmp_path))) == []


def test_cuda_version_of_the_installed_torch() -> None:
    import torch

    found = checks_gpu.torch_cuda_version()
    assert (found and f"{found[0]}.{found[1]}") == torch.version.cuda


def test_gpu_memory(tmp_path: Path) -> None:
    check = checks_gpu.check_gpu_memory
    tutorial = {"KT_NUM_GPU_EXPERTS": "1", "KT_MAX_TOTAL_TOKENS": "40000"}
    result = one(check, tmp_path, **tutorial)
    assert (result.status, result.expected) == (
        Status.PASS,
        "28.1 GiB free on each GPU for V3.2 (the model is not there yet)",
    )
    assert "what is in use is not known" in result.found
    busy = one(check, tmp_path, with_gpu(replace(L20, used_bytes=30 * GIB)), **tutorial)
    assert (busy.status, busy.todo) == (Status.FAIL, "end the programs that nvidia-smi lists")
    assert busy.found == "18.0 of 48.0 GiB"


def test_gpu_memory_says_which_numbers_to_change(tmp_path: Path) -> None:
    check = checks_gpu.check_gpu_memory
    small = with_gpu(replace(L20, memory_bytes=int(23.65 * GIB), used_bytes=0))
    tutorial = {"KT_NUM_GPU_EXPERTS": "1", "KT_MAX_TOTAL_TOKENS": "40000"}
    result = one(check, tmp_path, small, **tutorial)
    todo = "set KT_NUM_GPU_EXPERTS=0 KT_MAX_TOTAL_TOKENS=19000, which fit, or leave them to auto"
    assert (result.status, result.todo) == (Status.FAIL, todo)
    numbers = {"KT_NUM_GPU_EXPERTS": "0", "KT_MAX_TOTAL_TOKENS": "19000"}
    assert one(check, tmp_path, small, **numbers).status is Status.PASS
    # Without a number SGLang's cache takes all but 2%, and the activations find no room.
    unlimited = one(check, tmp_path, KT_MAX_TOTAL_TOKENS="none")
    assert (unlimited.status, unlimited.todo[:4]) == (Status.FAIL, "set ")
    modest = {"KT_MAX_TOTAL_TOKENS": "none", "KT_MEM_FRACTION_STATIC": "0.9"}
    assert one(check, tmp_path, **modest).status is Status.PASS
    tiny_card = with_gpu(replace(L20, memory_bytes=16 * GIB, used_bytes=0))
    assert one(check, tmp_path, tiny_card).todo.startswith("raise KT_TENSOR_PARALLEL_SIZE")


def test_number_of_gpus(tmp_path: Path) -> None:
    result = one(checks_gpu.check_device, tmp_path, KT_TENSOR_PARALLEL_SIZE="2")
    assert (result.status, result.expected) == (Status.FAIL, "2 NVIDIA GPUs")
    assert "set KT_TENSOR_PARALLEL_SIZE=1" in result.todo
    two = with_gpu(replace(L20, count=2))
    assert one(checks_gpu.check_device, tmp_path, two, KT_TENSOR_PARALLEL_SIZE="2").status == "PASS"
