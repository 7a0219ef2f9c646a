"""Facts about the machine as a whole."""

from __future__ import annotations

import pytest

from kt_kernel.host.machine import Machine, survey


def test_this_machine() -> None:
    machine = survey()
    assert 1 <= machine.numa_nodes <= machine.cores <= machine.cpus
    assert 1 <= machine.expert_threads(1) <= machine.expert_threads(0) <= machine.cores


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
