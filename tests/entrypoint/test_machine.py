"""Facts about the machine, from made-up /sys and /proc trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.machine import Machine, count_cores, count_numa_nodes, find_gpu, survey
from kt_kernel.host import parse_cpu_list, read_cpu_quota


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cores_with_hyperthreads(tmp_path: Path) -> None:
    pattern = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(tmp_path, {pattern.format(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)})
    assert count_cores(set(range(8)), tmp_path) == 4
    assert count_cores({0, 4, 1}, tmp_path) == 2
    assert count_cores({0, 1, 99}, tmp_path) == 3  # of CPU 99 the kernel says nothing


def test_numa_nodes_of_the_cpu_set(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "sys/devices/system/node/node0/cpulist": "0-3\n",
            "sys/devices/system/node/node1/cpulist": "4-7\n",
            "sys/devices/system/node/node2/cpulist": "\n",  # memory only
        },
    )
    assert count_numa_nodes(set(range(8)), tmp_path) == 2
    assert count_numa_nodes({4, 5}, tmp_path) == 1
    assert count_numa_nodes({4, 5}, tmp_path / "nothing") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set()), ("0-1,4-5", {0, 1, 4, 5})],
)
def test_parse_cpu_list(text: str, expected: set[int]) -> None:
    assert parse_cpu_list(text) == expected


@pytest.mark.parametrize("text", ["a", "1-b", "-"])
def test_parse_cpu_list_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpu_list(text)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}, 8.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert read_cpu_quota(write(tmp_path, files)) == quota


def test_gpu_files_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("deploy.machine.ctypes.CDLL", no_library)
    assert find_gpu(tmp_path) == (None, "")
    write(tmp_path, {"dev/nvidia0": ""})
    gpu, problem = find_gpu(tmp_path)
    assert gpu is None
    assert "libcuda.so.1 is missing" in problem


def test_this_machine() -> None:
    machine = survey()
    assert 1 <= machine.numa_nodes <= machine.cores <= machine.cpus
    assert 1 <= machine.expert_threads(1) <= machine.expert_threads(0) <= machine.cores


@pytest.mark.parametrize(
    ("cpus", "cores", "quota", "threads"),
    [
        (128, 64, None, [64, 64, 64]),  # the second threads of the cores are left
        (64, 64, None, [64, 62, 61]),
        (64, 64, 32.5, [32, 30, 29]),
        (2, 2, None, [2, 1, 1]),
        (2, 1, 0.5, [1, 1, 1]),
    ],
)
def test_expert_threads(cpus: int, cores: int, quota: float | None, threads: list[int]) -> None:
    machine = Machine(cpus, cores, 1, quota, None)
    assert [machine.expert_threads(gpus) for gpus in (0, 1, 2)] == threads
