"""The worker threads: how many, where they run, and how they stop.

The output does not depend on any of it: every task writes its own bytes at its own place.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from kt_kernel.host.cpus import cpus_of_nodes, within_quota
from kt_kernel.host.limits import read_cpu_quota


class Stopped(Exception):
    """The run was asked to stop (SIGINT or SIGTERM).

    Attributes:
        signum: the signal that asked.
        finished: how much is finished, for people; empty before the first layer.
    """

    def __init__(self, signum: int, finished: str = "") -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
        self.finished = finished


class StopRequest:
    """Set by a signal handler, asked by the workers between two pieces of work."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def check(self) -> None:
        """Raises :class:`Stopped` if the run was asked to stop."""
        if self.signum is not None:
            raise Stopped(self.signum)


def default_thread_count(root: Path = Path("/")) -> int:
    """CPUs this process may use: its affinity mask, and no more than its cgroups' CPU quota.

    ``root`` is where ``/proc`` and ``/sys`` are, for tests.
    """
    return within_quota(len(os.sched_getaffinity(0)), read_cpu_quota(root), math.ceil)


def worker_pool(threads: int, nodes: int) -> ThreadPoolExecutor:
    """A pool of ``threads`` workers, spread evenly over the first ``nodes`` NUMA nodes.

    On a machine with one node, or with ``nodes`` 1, the workers are not bound to anything.
    """
    places = list(cpus_of_nodes().values())[:nodes]
    numbers = itertools.count()
    lock = threading.Lock()

    def bind() -> None:
        with lock:
            number = next(numbers)
        if len(places) > 1:
            # 0 is the calling thread: Linux sets the affinity of threads, not of processes.
            os.sched_setaffinity(0, places[number % len(places)])

    return ThreadPoolExecutor(threads, thread_name_prefix="convert", initializer=bind)


def run_all(
    pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], object]], stop: StopRequest
) -> None:
    """Run all tasks and wait for them; after the first failure no further task is started.

    When this returns or raises, no task is running any more, so the file that the tasks write to
    may be closed.

    Raises:
        Stopped: a stop was requested.
        Exception: what the first failed task raised.
    """

    failed = threading.Event()

    def guarded(task: Callable[[], object]) -> None:
        if failed.is_set():
            return
        try:
            stop.check()
            task()
        except BaseException:
            failed.set()
            raise

    futures = [pool.submit(guarded, task) for task in tasks]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()
    stop.check()
