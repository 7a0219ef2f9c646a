"""A conversion that kills its own process just before its N-th file operation.

The process is a fork of the test's, so the kill is a real SIGKILL and each one costs milliseconds
and not the start of an interpreter. A write is cut in half by the kill.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from convert.command import main

OPERATIONS = ["open", "posix_fallocate", "pwrite", "fsync", "replace", "unlink", "ftruncate"]


def count_operations(kill_at: int) -> Callable[[], int]:
    """Wrap the operations in ``os``; returns a function that says how many were made."""
    lock = threading.Lock()
    count = 0

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                if count == kill_at:
                    if name == "pwrite":
                        fd, data, offset = args
                        original(fd, data[: len(data) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, operation)

    for name in OPERATIONS:
        wrap(name)
    return lambda: count


def convert_in_fork(kill_at: int, argv: list[str]) -> tuple[int, int]:
    """Convert in a child process that dies before operation ``kill_at`` (0: it does not).

    Returns:
        The signal that ended the child, 0 if it finished, and then the operations it made.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            operations = count_operations(kill_at)
            code = main(argv)
            os.write(write_end, str(operations()).encode())
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        operations_made = int(pipe.read() or 0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), operations_made
    assert os.WEXITSTATUS(status) == 0, f"exit code {os.WEXITSTATUS(status)}"
    return 0, operations_made
