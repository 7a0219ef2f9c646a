"""The benchmark's side of a worker process (see ``workers/protocol.py``)."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"


class WorkerFailed(Exception):
    """The engine cannot run here, or its process died or did not answer; the message says why."""


class Worker:
    """A process that holds one engine. It is stopped (SIGSTOP) except while it is asked something:
    some engines' threads poll forever and would take the cores from the one being timed.

    Args:
        script: a script of ``WORKERS``.
        job: its ``Job``, as a dictionary.
        log: file that gets what the engine prints.
        timeout: seconds for any answer.
    """

    def __init__(self, script: Path, job: dict[str, Any], log: Path, timeout: float) -> None:
        command = [sys.executable, str(script), json.dumps(job)]
        self._log = log
        self._timeout = timeout
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._buffer = b""
        ready = self._answer()
        self._stop()
        if "unavailable" in ready:
            self.close()
            raise WorkerFailed(ready["unavailable"])
        self.description: dict[str, Any] = ready["ready"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let it run, send one request, return the answer.

        Raises:
            WorkerFailed: it died or took too long; it is closed then.
        """
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it died is told when no answer comes
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer()
        self._stop()
        return answer

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise WorkerFailed(f"no answer within {self._timeout:.0f} s")
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(5)  # it is ending by itself, and its status says how
                    self.close()
                    raise WorkerFailed(self._why_it_died())
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why_it_died(self) -> str:
        code = self._process.returncode
        how = f"exit status {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with {how}" + (f": {lines[-1][:200]}" if lines else "")

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
