"""The processes that hold the engines: answers, failures, and that the idle ones take no time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.worker_process import WORKERS, Worker, WorkerFailed

Start = Callable[..., Worker]

# A worker that polls for ever in a thread, as some engines do, and answers with its CPU time.
POLLER = """
import sys, threading, time
sys.path.insert(0, {workers!r})
import numpy as np
from protocol import Call, Unavailable, serve

def poll():
    while True:
        pass

class Engine:
    def __init__(self, job):
        print("noise on standard output")
        if job.method == "missing":
            raise Unavailable("needs a CPU of 2040")
        if job.method == "crash":
            sys.exit("it broke")
        threading.Thread(target=poll, daemon=True).start()
    def describe(self):
        return {{"bits": 4.0}}
    def bind(self, x, ids, weights):
        self.ids = ids
        return Call(run=lambda: None, result=lambda: np.full(x.shape, 3.0, np.float32))

serve(Engine)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    script = tmp_path / "worker.py"
    script.write_text(POLLER.format(workers=str(WORKERS)))
    started: list[Worker] = []

    def start(method: str = "", timeout: float = 60.0) -> Worker:
        job = {"method": method, "threads": 1, "experts": 16, "max_tokens": 8, "sources": ""}
        started.append(Worker(script, job, tmp_path / "log", timeout))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def cpu_seconds(worker: Worker) -> float:
    fields = Path(f"/proc/{worker._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_times_and_counts_distinct_experts(start: Start) -> None:
    answer = start().ask(time=4, seed=1, seconds=30, calls=3)
    assert len(answer["ms"]) == len(answer["experts"]) == 3
    assert all(8 <= count <= 16 for count in answer["experts"])


def test_an_idle_worker_takes_no_cpu_time(start: Start) -> None:
    worker = start()
    worker.ask(time=1, seed=1, seconds=0, calls=1)
    before = cpu_seconds(worker)
    time.sleep(0.5)
    assert cpu_seconds(worker) - before < 0.1


def test_an_engine_that_does_not_run_here_says_why(start: Start) -> None:
    with pytest.raises(WorkerFailed, match="needs a CPU of 2040"):
        start("missing")


def test_a_process_that_ends_is_reported_with_its_last_line(start: Start) -> None:
    with pytest.raises(WorkerFailed, match="exit status 1: it broke"):
        start("crash")


def test_a_process_that_is_killed_is_reported(start: Start) -> None:
    worker = start()
    os.kill(worker._process.pid, signal.SIGILL)
    with pytest.raises(WorkerFailed, match="signal SIGILL"):
        worker.ask(time=1, seed=1, seconds=0, calls=1)


def test_a_worker_that_does_not_answer_is_ended(start: Start) -> None:
    worker = start(timeout=5.0)
    worker._timeout = 0.3
    with pytest.raises(WorkerFailed, match="no answer within 0 s"):
        worker.ask(time=1, seed=1, seconds=30.0, calls=10**9)
    assert worker._process.returncode == -signal.SIGKILL


def test_a_result_is_compared_with_the_expected_one(start: Start, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "check.npz",
        x=np.zeros((2, 4), np.uint16),
        ids=np.zeros((2, 8), np.int64),
        weights=np.ones((2, 8)),
        expected=np.array([[3, 3, 3, 3], [2, 4, 2, 4]], np.float32),
    )
    assert start().ask(check=str(tmp_path / "check.npz"))["error"] == pytest.approx(0.5 / 3)
