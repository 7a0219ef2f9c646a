"""What a benchmark has to say about the machine it ran on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from kt_kernel.host import parse_cpu_list

_SYS_CPU = Path("/sys/devices/system/cpu")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def cpu_brand() -> str:
    """Model name from /proc/cpuinfo; the machine's architecture where there is none."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.machine()


def allowed_cpus() -> list[int]:
    """CPUs that this process may use, one of each physical core before any second hyperthread."""

    def rank(cpu: int) -> int:
        siblings = parse_cpu_list(_read(_SYS_CPU / f"cpu{cpu}/topology/thread_siblings_list"))
        return sorted(siblings).index(cpu) if cpu in siblings else 0

    return sorted(os.sched_getaffinity(0), key=lambda cpu: (rank(cpu), cpu))


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first allowed CPU; 0 where the kernel does not say."""
    folder = _SYS_CPU / f"cpu{min(os.sched_getaffinity(0))}/cache"
    sizes = [_read(path) for path in folder.glob("index*/size")]
    return max((parse_size(size) for size in sizes), default=0)


def parse_size(text: str) -> int:
    """``"32768K"`` -> 33554432; 0 for what is not a size."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


def describe() -> dict[str, str | int]:
    """The machine as it is written into a result."""
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return {
        "cpu": cpu_brand(),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "kernel": platform.release().partition("-")[0],
    }
