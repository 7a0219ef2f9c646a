"""CPUs, their cores and nodes, from made-up /sys trees; which of them the workers take."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from kt_kernel.host.cpus import (
    CPU_LIMIT,
    Cpu,
    allowed_cpus,
    choose_cpus,
    cores_first,
    count_cores,
    cpus_of_nodes,
    parse_cpu_list,
    within_quota,
)
from tests.kt_kernel.host.fake_machine import write


def allow(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))


def write_cores(root: Path, *lists: str) -> None:
    """One list of siblings for each CPU."""
    folder = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(root, {folder.format(cpu): text + "\n" for cpu, text in enumerate(lists)})


def write_nodes(root: Path, *lists: str) -> None:
    folder = "sys/devices/system/node/node{}/cpulist"
    write(root, {folder.format(node): text + "\n" for node, text in enumerate(lists)})


def test_cores_with_hyperthreads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cores(tmp_path, *[f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)])
    for cpus, cores in (
        (range(8), 4),
        ([0, 4, 1], 2),
        ([0, 1, 99], 3),  # of CPU 99 the kernel says nothing
    ):
        allow(monkeypatch, *cpus)
        assert count_cores(allowed_cpus(tmp_path)) == cores


def test_the_rank_counts_cpus_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cores(tmp_path, "0,2", "1,3", "0,2", "1,3")
    allow(monkeypatch, 0, 1, 2, 3)
    assert [cpu.core_rank for cpu in allowed_cpus(tmp_path)] == [0, 0, 1, 1]
    allow(monkeypatch, 0, 2, 3)  # 3 has its core for itself
    found = allowed_cpus(tmp_path)
    assert found == [Cpu(0, 0, 0), Cpu(2, 0, 1), Cpu(3, 0, 0)]
    assert [cpu.id for cpu in cores_first(found)] == [0, 3, 2]


def test_nodes_of_the_cpu_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Node 2 has memory only, node 1 has CPUs this process may not use, too.
    write_nodes(tmp_path, "0-3", "4-7", "")
    allow(monkeypatch, 0, 1, 5, 6)
    assert cpus_of_nodes(tmp_path) == {0: {0, 1}, 1: {5, 6}}
    assert [cpu.node for cpu in allowed_cpus(tmp_path)] == [0, 0, 1, 1]
    assert cpus_of_nodes(tmp_path / "nothing") == {0: {0, 1, 5, 6}}
    allow(monkeypatch, 4, 5)
    assert cpus_of_nodes(tmp_path) == {1: {4, 5}}
    write(tmp_path, {"sys/devices/system/node/node0/cpulist": "what"})
    assert cpus_of_nodes(tmp_path) == {0: {4, 5}}


def test_a_list_takes_no_more_memory_than_cpus_can_be() -> None:
    """Fails when a range is expanded before it is bounded: ``0-99999999999`` took 20 GB."""
    assert parse_cpu_list("0-3,8") == {0, 1, 2, 3, 8}
    assert max(parse_cpu_list(f"0-{CPU_LIMIT - 1}")) == CPU_LIMIT - 1
    for text in (f"0-{CPU_LIMIT}", f"{CPU_LIMIT}", f"5,0-{10**18}", "8-3", "-1", "0-x"):
        with pytest.raises(ValueError, match=r"ids below|invalid literal"):
            parse_cpu_list(text)


def test_quota_is_rounded() -> None:
    assert within_quota(8, None) == within_quota(8, 9.5) == 8
    assert (within_quota(8, 2.5), within_quota(8, 2.5, math.ceil)) == (2, 3)
    assert within_quota(8, 0.5) == 1


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


def topology(nodes: int, cores: int, threads: int = 2) -> list[Cpu]:
    """(CPU, node, rank) as Linux numbers them: first the first thread of every core."""
    return [
        Cpu(rank * nodes * cores + node * cores + core, node, rank)
        for rank in range(threads)
        for node in range(nodes)
        for core in range(cores)
    ]


@pytest.mark.parametrize(
    ("cpus", "threads", "pools", "groups"),
    [
        (topology(2, 4), 8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (topology(2, 4), 5, 2, [[0, 1, 2], [4, 5]]),
        # Hyperthreads only when there are no cores left.
        (topology(2, 2), 6, 2, [[0, 1, 4], [2, 3, 6]]),
        (topology(1, 4), 4, 2, [[0, 1], [2, 3]]),
        (topology(2, 2), 2, 1, [[0, 1]]),
        (topology(2, 2, 1), 4, 1, [[0, 1, 2, 3]]),
        # A CPU set that has little of a node: others help its group.
        ([Cpu(cpu, cpu // 4, 0) for cpu in range(5)], 5, 2, [[0, 1, 2], [4, 3]]),
        # No more workers than CPUs, no more groups than workers.
        (topology(2, 1, 1), 9, 2, [[0], [1]]),
        (topology(2, 1, 1), 9, 3, [[0], [1]]),
        (topology(2, 4), 1, 2, [[0]]),
    ],
)
def test_choice_of_cpus(cpus: list[Cpu], threads: int, pools: int, groups: list[list[int]]) -> None:
    assert choose_cpus(cpus, threads, pools) == groups


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="thread count is 0: expected at least 1"):
        choose_cpus(topology(1, 1), 0, 1)
    with pytest.raises(ValueError, match="threadpool count is 0: expected at least 1"):
        choose_cpus(topology(1, 1), 1, 0)
