"""What a benchmark has to say about the machine it ran on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from kt_kernel import _ext
from kt_kernel.host import cpus
from kt_kernel.host.limits import text_of
from kt_kernel.host.memory import read_memory

_SYS_CPU = Path("/sys/devices/system/cpu")


def cpu_brand() -> str:
    """The CPU's name for itself; the machine's architecture where it has none."""
    return _ext.cpu_brand() or platform.machine()


def allowed_cpus() -> list[int]:
    """CPUs that this process may use, one of each physical core before any second hyperthread."""
    return [cpu.id for cpu in cpus.cores_first(cpus.allowed_cpus())]


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first allowed CPU; 0 where the kernel does not say."""
    folder = _SYS_CPU / f"cpu{min(os.sched_getaffinity(0))}/cache"
    sizes = [text_of(path) for path in folder.glob("index*/size")]
    return max((parse_size(size) for size in sizes), default=0)


def parse_size(text: str) -> int:
    """``"32768K"`` -> 33554432; 0 for what is not a size."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


def describe() -> dict[str, str | int]:
    """The machine as it is written into a result."""
    return {
        "cpu": cpu_brand(),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": read_memory().total,
        "kernel": platform.release().partition("-")[0],
    }
