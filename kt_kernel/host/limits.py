"""What the control groups, the resource limits and the account grant this process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

#: What a control group (v1) says for "no limit" is the largest multiple of a page; anything near
#: it is none.
_NO_LIMIT = 1 << 60


def text_of(file: Path) -> str:
    """What a small file of the kernel says, empty if it cannot be read."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


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


def read_memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups (v1 or v2) grant this process, None if unlimited."""
    limits = []
    for file in _limit_files(root):
        text = text_of(file)
        if text.isdigit() and int(text) < _NO_LIMIT:
            limits.append(int(text))
    return min(limits, default=None)


def _limit_files(root: Path) -> Iterator[Path]:
    groups = root / "sys/fs/cgroup"
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            yield from (folder / "memory.max" for folder in ancestors(groups, group))
        elif "memory" in controllers.split(","):
            for folder in ancestors(groups / "memory", group):
                yield folder / "memory.limit_in_bytes"


def locked_memory_limit() -> int | None:
    """Bytes that this process may lock in memory, None if unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def kernel_release(root: Path = Path("/")) -> str:
    """The kernel's release, as in ``6.8.0-45-generic``; empty if unknown."""
    return text_of(root / "proc/sys/kernel/osrelease")


def is_wsl(release: str) -> bool:
    """Whether a kernel of this release is that of the Windows Subsystem for Linux."""
    return "microsoft" in release.lower()
