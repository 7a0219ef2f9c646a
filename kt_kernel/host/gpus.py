"""The GPUs, as the driver itself tells.

``CUDA_VISIBLE_DEVICES`` of this process is respected, and torch is not needed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

_CUDA_ERROR_NO_DEVICE = 100
# CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT and CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED


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
        virtual_memory: the card maps memory to addresses later (``cuMemMap``); not every vGPU does.
    """

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    cuda_version: tuple[int, int]
    driver: str = ""
    used_bytes: int | None = None
    count: int = 1
    multiprocessors: int = 0
    virtual_memory: bool = True

    @property
    def free_bytes(self) -> int:
        """Memory that nothing uses, as far as the driver tells."""
        return self.memory_bytes - (self.used_bytes or 0)


def find_gpu(root: Path = Path("/")) -> tuple[Gpu | None, str]:
    """The first GPU that CUDA shows this process, and what is wrong if there should be one."""
    driver = _driver()
    if driver is None:
        if (root / "dev/nvidia0").exists():
            return None, "there is /dev/nvidia0, but the driver's library libcuda.so.1 is missing"
        return None, ""
    status = driver.cuInit(0)
    if status == _CUDA_ERROR_NO_DEVICE:
        return None, ""
    if status != 0:
        return None, f"the NVIDIA driver refuses to start (cuInit gives error {status})"
    device, count = ctypes.c_int(), _count(driver)
    if count == 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None, ""
    return _describe_gpu(driver, device, count), ""


def count_gpus() -> int:
    """GPUs that CUDA shows this process; 0 also where the driver does not start."""
    driver = _driver()
    return 0 if driver is None or driver.cuInit(0) != 0 else _count(driver)


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _count(driver: ctypes.CDLL) -> int:
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


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
        virtual_memory=bool(attribute(_VIRTUAL_MEMORY)),
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
