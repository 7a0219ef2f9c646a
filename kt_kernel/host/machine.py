"""This machine as a whole: CPUs, NUMA nodes, CPU quota, GPU; found without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kt_kernel.host.cpus import (
    allowed_cpus,
    count_cores,
    cpus_beside_experts,
    cpus_of_nodes,
    within_quota,
)
from kt_kernel.host.gpus import Gpu, find_gpu
from kt_kernel.host.limits import is_wsl, kernel_release, read_cpu_quota


@dataclass(frozen=True)
class Machine:
    """Facts about this machine as far as this process may use it.

    Attributes:
        cpus: logical CPUs in the process's CPU set.
        cores: physical cores behind them.
        numa_nodes: NUMA nodes that have at least one of them.
        cpu_quota: CPUs' worth of time the control group grants, None if unlimited.
        gpu: None if there is no GPU to use.
        gpu_problem: why there is none although there should be one; else empty.
        wsl: it is a Windows Subsystem for Linux.
    """

    cpus: int
    cores: int
    numa_nodes: int
    cpu_quota: float | None
    gpu: Gpu | None
    gpu_problem: str = ""
    wsl: bool = False

    @property
    def usable_cpus(self) -> int:
        """Logical CPUs that can be busy at the same time: the CPU set's, within the quota."""
        return within_quota(self.cpus, self.cpu_quota)

    def expert_threads(self, gpus: int) -> int:
        """Threads for KT_CPUINFER=auto: one per physical core, but for what else must run.

        gpus: how many the server is to use, 0 for the CPU mode.
        """
        return max(1, min(self.cores, self.usable_cpus - cpus_beside_experts(gpus)))


def survey(root: Path = Path("/")) -> Machine:
    """Look at the machine. ``root`` is where /sys, /proc and /dev are looked for."""
    cpus = allowed_cpus(root)
    gpu, gpu_problem = find_gpu(root)
    return Machine(
        cpus=len(cpus),
        cores=count_cores(cpus),
        numa_nodes=len(cpus_of_nodes(root)),
        cpu_quota=read_cpu_quota(root),
        gpu=gpu,
        gpu_problem=gpu_problem,
        wsl=is_wsl(kernel_release(root)),
    )
