"""What the kernel grants, from made-up /proc and /sys trees and from this machine."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from kt_kernel.host import cpus, limits
from kt_kernel.host import memory as host_memory
from kt_kernel.host.limits import read_memory_limit
from kt_kernel.host.memory import huge_page_mode, read_memory
from tests.kt_kernel.host.fake_machine import GIB, host, write


def test_memory_of_a_host(tmp_path: Path) -> None:
    memory = read_memory(host(tmp_path, 512, MemAvailable=400))
    assert (memory.total, memory.available, memory.limit) == (512 * GIB, 400 * GIB, None)
    assert memory.nodes == {0: 256 * GIB, 1: 256 * GIB}
    assert memory.commit_left is None


def test_nodes_that_the_cpuset_forbids_do_not_count(tmp_path: Path) -> None:
    host(tmp_path, 512, nodes=4)
    write(tmp_path, {"proc/self/status": "Mems_allowed_list:\t1,3\n"})
    assert list(read_memory(tmp_path).nodes) == [1, 3]


def test_no_overcommit(tmp_path: Path) -> None:
    host(tmp_path, 512, CommitLimit=256, Committed_AS=56)
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    assert read_memory(tmp_path).commit_left == 200 * GIB


def test_a_silent_kernel(tmp_path: Path) -> None:
    memory = read_memory(tmp_path)
    assert (memory.total, memory.limit, memory.nodes) == (0, None, {})
    assert cpus.online_cpus(tmp_path) == 0
    assert huge_page_mode(tmp_path) == ""
    assert host_memory.shared_memory(tmp_path) == (0, False)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000\n"}, 1000),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "500\n",
                "sys/fs/cgroup/a/b/memory.max": "800\n",
            },
            500,
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/docker/x\n3:cpuset:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "700\n",
            },
            700,
        ),
        (
            {
                # Inside the container, its own group is the mount.
                "proc/self/cgroup": "9:memory:/docker/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "600\n",
            },
            600,
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
        ),
    ],
)
def test_memory_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert read_memory_limit(write(tmp_path, files)) == limit


@pytest.mark.parametrize("mode", ["always", "madvise", "never"])
def test_huge_page_mode(tmp_path: Path, mode: str) -> None:
    words = [f"[{word}]" if word == mode else word for word in ("always", "madvise", "never")]
    write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": " ".join(words) + "\n"})
    assert huge_page_mode(tmp_path) == mode


def test_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_kernel.host.limits.resource.getrlimit", lambda _: (8192, 8192))
    assert limits.locked_memory_limit() == 8192
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(
        "kt_kernel.host.limits.resource.getrlimit", lambda _: (unlimited, unlimited)
    )
    assert limits.locked_memory_limit() is None


def test_this_machine() -> None:
    memory = read_memory()
    assert memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available <= memory.total
    assert cpus.online_cpus() >= len(os.sched_getaffinity(0))
    assert host_memory.memory_policy_error() in (0, errno.EPERM, errno.ENOSYS)
    size, writable = host_memory.shared_memory()
    assert size > 0
    assert writable == os.access("/dev/shm", os.W_OK)
