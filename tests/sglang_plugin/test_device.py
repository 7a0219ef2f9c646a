"""Where a server computes, and the environment that goes with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin import launch_environment
from kt_kernel.sglang_plugin.device import STAND_IN_PATH, check_cpu_environment, runs_on_cpu

REPOSITORY = Path(__file__).resolve().parents[2]


def test_cpu_environment_puts_the_stand_in_first() -> None:
    environment = launch_environment("cpu", {"PYTHONPATH": "/a:/b"})
    assert environment["PYTHONPATH"] == f"{STAND_IN_PATH}:/a:/b"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert (STAND_IN_PATH / "sgl_kernel" / "__init__.py").is_file()


def test_cpu_environment_is_idempotent() -> None:
    once = launch_environment("cpu", {"PYTHONPATH": "/a"})
    assert launch_environment("cpu", once) == once


def test_with_a_gpu_the_environment_stays_as_it_is() -> None:
    assert launch_environment("cuda", {"PYTHONPATH": "/a"}) == {"KT_DEVICE": "cuda"}


def test_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="'gpu'; expected one of auto, cuda, cpu"):
        launch_environment("gpu", {})
    with pytest.raises(UserError, match="'gpu'"):
        runs_on_cpu({"KT_DEVICE": "gpu"})


@pytest.mark.parametrize(
    ("environ", "gpu", "on_cpu"),
    [
        ({}, True, False),
        ({}, False, True),
        ({"KT_DEVICE": ""}, True, False),
        ({"KT_DEVICE": "auto"}, False, True),
        ({"KT_DEVICE": "cpu"}, True, True),
        ({"KT_DEVICE": "cuda"}, False, False),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, True, True),
        ({"SGLANG_USE_CPU_ENGINE": "1", "KT_DEVICE": "cuda"}, True, False),
    ],
)
def test_decision(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], gpu: bool, on_cpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert runs_on_cpu(environ) is on_cpu


def test_unprepared_cpu_environment_says_what_to_set() -> None:
    check_cpu_environment(launch_environment("cpu", {}))
    with pytest.raises(UserError, match=r"set SGLANG_USE_CPU_ENGINE=1 and PYTHONPATH=.*stand_in"):
        check_cpu_environment({})
    behind = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"/a:{STAND_IN_PATH}"}
    with pytest.raises(UserError, match="PYTHONPATH="):
        check_cpu_environment(behind)


def test_importing_the_launcher_side_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from kt_kernel.sglang_plugin import detect_device, launch_environment\n"
        "launch_environment('auto', {})\n"
        "print([name for name in ('torch', 'sglang', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
