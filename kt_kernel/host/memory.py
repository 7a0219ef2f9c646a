"""Main memory: how much there is, on which nodes, and what the kernel does with it."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.host.cpus import parse_cpu_list
from kt_kernel.host.limits import read_memory_limit, text_of

_SYS_MBIND = 237  # x86-64
_MPOL_DEFAULT = 0


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes.

    Attributes:
        total: of the machine.
        available: that programs could get now.
        limit: what the control groups grant, None if unlimited.
        nodes: by NUMA node, those that this process may use; empty if the kernel does not say.
        commit_left: what may still be allocated when the kernel refuses to overcommit
            (``vm.overcommit_memory=2``), else None.
    """

    total: int
    available: int
    limit: int | None
    nodes: dict[int, int]
    commit_left: int | None


def read_memory(root: Path = Path("/")) -> Memory:
    """Look at the memory; ``root`` is where /proc and /sys are looked for."""
    fields = _meminfo(root / "proc/meminfo")
    commit_left = None
    if text_of(root / "proc/sys/vm/overcommit_memory") == "2":
        commit_left = fields.get("CommitLimit", 0) - fields.get("Committed_AS", 0)
    total = fields.get("MemTotal", 0)
    return Memory(
        total=total,
        available=fields.get("MemAvailable", total),
        limit=read_memory_limit(root),
        nodes=_node_memory(root),
        commit_left=commit_left,
    )


def _meminfo(file: Path) -> dict[str, int]:
    """``MemTotal`` and so on in bytes; understands the files of NUMA nodes, too."""
    fields = {}
    for line in text_of(file).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name.split()[-1]] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return fields


def _node_memory(root: Path) -> dict[int, int]:
    allowed = None
    for line in text_of(root / "proc/self/status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            allowed = parse_cpu_list(line.partition(":")[2])
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        node = int(folder.name.removeprefix("node"))
        total = _meminfo(folder / "meminfo").get("MemTotal", 0)
        if total and (allowed is None or node in allowed):
            nodes[node] = total
    return dict(sorted(nodes.items()))


def huge_page_mode(root: Path = Path("/")) -> str:
    """Mode of transparent huge pages: ``always``, ``madvise`` or ``never``; empty if unknown."""
    text = text_of(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0]


def shared_memory(root: Path = Path("/")) -> tuple[int, bool]:
    """Size of /dev/shm in bytes (0 if there is none) and whether it can be written."""
    folder = root / "dev/shm"
    try:
        stat = os.statvfs(folder)
    except OSError:
        return 0, False
    return stat.f_frsize * stat.f_blocks, os.access(folder, os.W_OK)


def memory_policy_error() -> int:
    """0 if this process may bind memory to NUMA nodes, else the kernel's error number.

    Asks for the default policy on a page of its own, which changes nothing; container engines
    forbid the call itself unless the container has the capability SYS_NICE.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    size, read_write, private_anonymous = 4096, 3, 0x22
    page = libc.mmap(None, size, read_write, private_anonymous, -1, 0)
    if page in (None, ctypes.c_void_p(-1).value):
        return errno.ENOMEM
    arguments = [ctypes.c_void_p(page), ctypes.c_ulong(size), ctypes.c_int(_MPOL_DEFAULT)]
    arguments += [ctypes.c_void_p(None), ctypes.c_ulong(0), ctypes.c_uint(0)]
    status = libc.syscall(ctypes.c_long(_SYS_MBIND), *arguments)
    error = ctypes.get_errno() if status != 0 else 0
    libc.munmap(ctypes.c_void_p(page), ctypes.c_size_t(size))
    return error
