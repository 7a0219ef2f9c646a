"""Thread counts, NUMA nodes and the way tasks stop."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from convert import workers
from convert.workers import (
    Stopped,
    StopRequest,
    default_thread_count,
    run_all,
    worker_pool,
)


def test_default_thread_count_respects_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert default_thread_count(tmp_path) == 8  # no control groups
    quota = tmp_path / "sys/fs/cgroup/cpu.max"
    for file in (quota, tmp_path / "proc/self/cgroup"):
        file.parent.mkdir(parents=True)
        file.write_text("0::/\n")
    for text, threads in (("max", 8), ("250000", 3), ("5000", 1)):
        quota.write_text(f"{text} 100000\n")
        assert default_thread_count(tmp_path) == threads


def test_workers_are_spread_over_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: bound.append(cpus))
    monkeypatch.setattr(workers, "cpus_of_nodes", lambda: {0: {0}, 1: {1}, 2: {2}})
    everyone = threading.Barrier(4)
    with worker_pool(4, nodes=2) as pool:
        run_all(pool, [lambda: everyone.wait(10)] * 4, StopRequest())
    assert sorted(map(sorted, bound)) == [[0], [0], [1], [1]]
    bound.clear()
    with worker_pool(2, nodes=1) as pool:
        run_all(pool, [lambda: None] * 4, StopRequest())
    assert bound == []


def test_run_all_starts_nothing_after_a_failure() -> None:
    ran: list[int] = []

    def task(number: int) -> None:
        ran.append(number)
        if number == 2:
            raise KeyError("two")

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError, match="two"):
        run_all(pool, [partial(task, n) for n in range(100)], StopRequest())
    assert ran == [0, 1, 2]


def test_run_all_waits_for_running_tasks() -> None:
    finished = threading.Event()
    release = threading.Event()

    def slow() -> None:
        release.wait(10)
        finished.set()

    def fail() -> None:
        threading.Timer(0.1, release.set).start()
        raise KeyError("failed")

    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyError):
        run_all(pool, [slow, fail], StopRequest())
    assert finished.is_set()


def test_run_all_stops_on_request() -> None:
    stop = StopRequest()
    ran: list[int] = []

    def task(number: int) -> None:
        ran.append(number)
        if number == 3:
            stop.signum = signal.SIGTERM

    with ThreadPoolExecutor(1) as pool, pytest.raises(Stopped) as stopped:
        run_all(pool, [partial(task, n) for n in range(50)], stop)
    assert ran == [0, 1, 2, 3]
    assert stopped.value.signum == signal.SIGTERM
