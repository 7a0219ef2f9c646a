"""What the host grants this process, as far as Python asks: CPU time, CPU lists and huge pages.

``root`` is where ``/proc`` and ``/sys`` are, for tests.
"""

from __future__ import annotations

import os
from pathlib import Path


def cpus_beside_experts(gpus: int) -> int:
    """CPUs that a server on so many GPUs needs besides the experts' threads; 0 for none.

    SGLang's scheduler of each GPU, and CUDA's thread for host functions on the first, poll all the
    time. A pinned worker that shares its CPU with one of them keeps each layer waiting for a time
    slice, which is milliseconds (docs/performance.md).
    """
    return gpus + 1 if gpus else 0


def home_problem() -> str:
    """Why this user has no home directory, in words; empty if there is one."""
    try:
        Path.home()
    except RuntimeError:
        return f"HOME is not set and user {os.getuid()} has no entry in /etc/passwd"
    return ""


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups grant this process, None if unlimited."""
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            limits += [_quota_v2(folder / "cpu.max") for folder in ancestors(groups, group)]
        elif "cpu" in controllers.split(","):
            for mount in (groups / "cpu", groups / controllers):
                limits += [_quota_v1(folder) for folder in ancestors(mount, group)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def ancestors(mount: Path, group: str) -> list[Path]:
    """The folder of a control group and those above it, up to the mount."""
    parts = [part for part in group.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _quota_v2(file: Path) -> float | None:
    try:
        quota, period = file.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if quota <= 0 else quota / period


def huge_page_mode(root: Path = Path("/")) -> str:
    """Mode of transparent huge pages: ``always``, ``madvise`` or ``never``; empty if unknown."""
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def parse_cpu_list(text: str) -> set[int]:
    """The CPUs of a kernel list such as ``0-3,8``.

    Raises:
        ValueError: the text is not a list of that form.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
