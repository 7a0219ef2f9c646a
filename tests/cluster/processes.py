"""End what a cluster of a test started."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

END_SECONDS = 30.0


def end_processes(name: str, value: str) -> None:
    """Kill all that were started with a variable in their environment, and what they started.

    Slurm's steps and their jobs are in sessions of their own and are no daemon's children: they
    outlive the cluster. Some write their titles over their environments, a part of it or all.

    Raises:
        AssertionError: one is still there.
    """
    word, deadline = f"{name}={value}".encode(), time.monotonic() + END_SECONDS
    while found := _started_with(word):  # again: a shell may have started one meanwhile
        assert time.monotonic() < deadline, f"{found} outlive the cluster of {value}"
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        while any(map(is_alive, found)) and time.monotonic() < deadline:
            time.sleep(0.02)


def _started_with(word: bytes) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        # It may have ended; psutil itself reads an environment up to the first gap.
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if word in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found |= {process, *process.children(recursive=True)}
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not ended yet; perhaps nobody waits for its status."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
