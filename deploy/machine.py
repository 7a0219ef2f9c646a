"""What this machine has, found without loading torch: cores, NUMA nodes, CPU quota, GPU."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.host import cpus_beside_experts, parse_cpu_list, read_cpu_quota

_CUDA_ERROR_NO_DEVICE = 100
# CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT and CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU that may be used.

    Attributes:
        name: as the driver calls it.
        memory_bytes: of the whole card.
        compute_capability: (major, minor).
        cuda_version: (major, minor), the newest CUDA that the driver runs.
        driver: its version, such as ``580.95.05``; empty if it does not tell.
        used_bytes: memory of the card that is in use; None if the driver does not tell.
        count: GPUs that this process may use.
        multiprocessors: of the card; 0 if the driver does not tell.
    """

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    cuda_version: tuple[int, int]
    driver: str = ""
    used_bytes: int | None = None
    count: int = 1
    multiprocessors: int = 0

    @property
    def free_bytes(self) -> int:
        """Memory that nothing uses, as far as the driver tells."""
        return self.memory_bytes - (self.used_bytes or 0)


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
    """

    cpus: int
    cores: int
    numa_nodes: int
    cpu_quota: float | None
    gpu: Gpu | None
    gpu_problem: str = ""

    @property
    def usable_cpus(self) -> int:
        """Logical CPUs that can be busy at the same time: the CPU set's, within the quota."""
        return self.cpus if self.cpu_quota is None else min(self.cpus, math.floor(self.cpu_quota))

    def expert_threads(self, gpus: int) -> int:
        """Threads for KT_CPUINFER=auto: one per physical core, but for what else must run.

        gpus: how many the server is to use, 0 for the CPU mode.
        """
        return max(1, min(self.cores, self.usable_cpus - cpus_beside_experts(gpus)))


def survey(root: Path = Path("/")) -> Machine:
    """Look at the machine. ``root`` is where /sys, /proc and /dev are looked for."""
    cpus = os.sched_getaffinity(0)
    gpu, gpu_problem = find_gpu(root)
    return Machine(
        cpus=len(cpus),
        cores=count_cores(cpus, root),
        numa_nodes=count_numa_nodes(cpus, root),
        cpu_quota=read_cpu_quota(root),
        gpu=gpu,
        gpu_problem=gpu_problem,
    )


def count_cores(cpus: set[int], root: Path = Path("/")) -> int:
    """Physical cores behind some logical CPUs; every CPU counts as one if the kernel is silent."""
    cores = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(min(parse_cpu_list(siblings.read_text())))
        except (OSError, ValueError):
            cores.add(cpu)
    return len(cores)


def count_numa_nodes(cpus: set[int], root: Path = Path("/")) -> int:
    """NUMA nodes that have at least one of the CPUs; 1 if the kernel is silent."""
    count = 0
    for node in (root / "sys/devices/system/node").glob("node[0-9]*"):
        try:
            count += bool(parse_cpu_list((node / "cpulist").read_text()) & cpus)
        except (OSError, ValueError):
            continue
    return max(count, 1)


def find_gpu(root: Path = Path("/")) -> tuple[Gpu | None, str]:
    """The first GPU that CUDA shows this process, and what is wrong if there should be one.

    Asks the driver itself, so CUDA_VISIBLE_DEVICES of this process is respected and torch is not
    needed.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if (root / "dev/nvidia0").exists():
            return None, "there is /dev/nvidia0, but the driver's library libcuda.so.1 is missing"
        return None, ""
    status = driver.cuInit(0)
    if status == _CUDA_ERROR_NO_DEVICE:
        return None, ""
    if status != 0:
        return None, f"the NVIDIA driver refuses to start (cuInit gives error {status})"
    device, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None, ""
    return _describe_gpu(driver, device, count.value), ""


def _describe_gpu(driver: ctypes.CDLL, device: ctypes.c_int, count: int) -> Gpu:
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    bus_id = ctypes.create_string_buffer(64)
    driver.cuDeviceGetPCIBusId(bus_id, len(bus_id), device)
    version_text, used = _ask_management_library(bus_id.value)
    return Gpu(
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        compute_capability=(attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)),
        cuda_version=(version.value // 1000, version.value % 1000 // 10),
        driver=version_text,
        used_bytes=used,
        count=count,
        multiprocessors=attribute(_MULTIPROCESSORS),
    )


class _NvmlMemory(ctypes.Structure):
    """``nvmlMemory_t``: bytes of a card."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _ask_management_library(bus_id: bytes) -> tuple[str, int | None]:
    """Driver version and used bytes of the card at a PCI address, as far as NVML tells them.

    CUDA itself tells free memory only to a program that starts to use the card.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return "", None
    except (OSError, AttributeError):
        return "", None
    try:
        version = ctypes.create_string_buffer(96)
        known = nvml.nvmlSystemGetDriverVersion(version, len(version)) == 0
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        found = (
            nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)) == 0
            and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        )
        return version.value.decode(errors="replace") if known else "", (
            int(memory.used) if found else None
        )
    finally:
        nvml.nvmlShutdown()
