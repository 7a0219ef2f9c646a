"""Facts about the machine as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_kernel.host.machine import Machine, survey
from tests.kt_kernel.host.fake_machine import write


def test_this_machine() -> None:
    machine = survey()
    assert 1 <= machine.numa_nodes <= machine.cores <= machine.cpus
    assert 1 <= machine.expert_threads(1) <= machine.expert_threads(0) <= machine.cores


@pytest.mark.parametrize(
    ("release", "wsl"), [("6.18.33.2-microsoft-standard-WSL2", True), ("6.8.0-45-generic", False)]
)
def test_wsl(tmp_path: Path, release: str, wsl: bool) -> None:
    write(tmp_path, {"proc/sys/kernel/osrelease": f"{release}\n"})
    assert survey(tmp_path).wsl == wsl


@pytest.mark.parametrize(
    ("cpus", "cores", "quota", "threads"),
    [
        (128, 64, None, [64, 64, 64]),  # the second threads of the cores are left
        (64, 64, None, [64, 62, 61]),
        (64, 64, 32.5, [32, 30, 29]),
        (2, 2, None, [2, 1, 1]),
        (2, 1, 0.5, [1, 1, 1]),
    ],
)
def test_expert_threads(cpus: int, cores: int, quota: float | None, threads: list[int]) -> None:
    machine = Machine(cpus, cores, 1, quota, None)
    assert [machine.expert_threads(gpus) for gpus in (0, 1, 2)] == threads
