"""CPUs that servers of this host have reserved for their experts: each takes others.

A pinned worker that shares its CPU with another server's keeps both waiting for time slices, while
other CPUs may be idle. So there is a file for each CPU in one directory, and whoever computes on a
CPU holds a lock on its file, which the kernel releases with the process.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kt_kernel.files.locks import CannotLock, try_lock
from kt_kernel.host.cpus import Cpu, choose_cpus

FOLDER_VARIABLE = "KT_CPU_LOCKS"
_TAKEN = 1 << 16  # comes after any hyperthread


def folder() -> Path:
    """Where the locks are: the same for all servers of the host, unless it is set."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(tempfile.gettempdir(), "kt-kernel-cpus"))


class Reservations:
    """The CPUs that this process has reserved, in a directory. Best effort: without one, none."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[int, int] = {}  # the descriptor of each CPU's lock

    def choose(
        self, cpus: Sequence[Cpu], threads: int, pools: int
    ) -> tuple[list[list[int]], list[int]]:
        """As :func:`choose_cpus`, but CPUs that others hold come last; and those taken all the
        same, since there are not as many others."""
        taken: set[int] = set()
        before = set(self._held)  # of this process's other engines
        while True:
            chosen = choose_cpus(_others_last(cpus, taken), threads, pools)
            wanted = {cpu for group in chosen for cpu in group}
            lost = {cpu for cpu in wanted - taken if not self._take(cpu)}
            if not lost:
                self._release(set(self._held) - wanted - before)
                return chosen, sorted(wanted & taken)
            taken |= lost

    def _take(self, cpu: int) -> bool:
        """Whether this process has the CPU's lock now, or nobody can tell."""
        if cpu in self._held:
            return True
        try:
            descriptor = _open(self._directory, cpu)
        except OSError:
            return True
        try:
            got = try_lock(descriptor, self._directory)
        except CannotLock:
            os.close(descriptor)
            return True
        if got:
            self._held[cpu] = descriptor
        else:
            os.close(descriptor)
        return got

    def _release(self, cpus: Collection[int]) -> None:
        for cpu in cpus:
            os.close(self._held.pop(cpu))


def _open(directory: Path, cpu: int) -> int:
    """A descriptor of the CPU's file, which may be another user's.

    Raises:
        OSError: it cannot be read, or it is a link.
    """
    path, flags = directory / f"cpu{cpu}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        return os.open(path, flags)
    if not directory.is_dir():
        with suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(0o1777)  # as /tmp is
    with suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    return os.open(path, flags)


def _others_last(cpus: Sequence[Cpu], taken: Collection[int]) -> list[Cpu]:
    """``cpus`` with those that are taken behind the others, and nodes with many of them behind."""
    count = Counter({cpu.node: 0 for cpu in cpus})
    count.update(cpu.node for cpu in cpus if cpu.id in taken)
    place = {node: at for at, node in enumerate(sorted(count, key=lambda n: (count[n], n)))}
    return [
        cpu._replace(
            node=place[cpu.node], core_rank=cpu.core_rank + (_TAKEN if cpu.id in taken else 0)
        )
        for cpu in cpus
    ]


def holders(directory: Path, root: Path = Path("/")) -> Mapping[int, int]:
    """The process that holds each reserved CPU; 0 for one in another PID namespace."""
    by_file: dict[int, int] = {}
    found = {}
    with suppress(OSError, ValueError):
        for line in (root / "proc/locks").read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
            words = line.split()
            if words[1] == "FLOCK":
                by_file[int(words[5].rpartition(":")[2])] = max(int(words[4]), 0)
        for path in directory.glob("cpu*"):
            inode = path.stat().st_ino
            if inode in by_file:
                found[int(path.name.removeprefix("cpu"))] = by_file[inode]
    return dict(sorted(found.items()))
