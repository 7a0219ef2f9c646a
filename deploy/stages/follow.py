"""``status --follow``: print what the stages do until the server is ready or one has failed."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from deploy.console import say
from kt_kernel.errors import UserError, one_line

POLL_SECONDS = 1.0
#: A stage that failed before, or crashed, may begin anew: only a failure that lasts is one.
FAILED_SECONDS = 10.0
#: The service may have been started a moment ago.
UNREACHABLE_SECONDS = 60.0


def run(host: str, port: int, interval: float, stream: TextIO | None = None) -> int:
    """Follow the status service at an address.

    Args:
        interval: seconds between lines of progress where the output is no terminal.

    Returns:
        0 when the server is ready, 1 when a stage has failed.

    Raises:
        UserError: no status service answers there.
    """
    return follow(lambda: ask(host, port), _Lines(stream or sys.stdout, interval))


def follow(reports: Callable[[], Mapping[str, Any]], lines: _Lines) -> int:
    """As :func:`run`; ``reports`` gives what the status service says."""
    failed_since: float | None = None
    while True:
        report = reports()
        phase, stage = report.get("phase"), report.get("stage")
        if phase == "ready":
            lines.end("ready")
            return 0
        if phase not in ("failed", "stopped"):
            failed_since = None
            lines.show(str(report.get("state")), (stage, phase))
        elif failed_since is None:
            failed_since = time.monotonic()
        elif time.monotonic() - failed_since > FAILED_SECONDS:
            lines.end(f"error: {stage}: {one_line(str(report.get('message')))}")
            return 1
        time.sleep(POLL_SECONDS)


def ask(host: str, port: int) -> Mapping[str, Any]:
    """What the status service says.

    Raises:
        UserError: it does not answer for a minute.
    """
    found: object = None
    told = False
    for _ in _until(UNREACHABLE_SECONDS):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request("GET", "/health")
            report = json.loads(connection.getresponse().read())
            if isinstance(report, dict):
                return report
            found = "another answer"
        except (OSError, ValueError, http.client.HTTPException) as error:
            found = error
        finally:
            connection.close()
        if not told:
            say(f"waiting up to a minute for the status service on port {port} of {host}")
            told = True
    raise UserError(
        f"no status service answers on KT_STATUS_PORT {port} of {host} ({found}): start one with "
        f"`python entrypoint.py status`"
    )


def _until(seconds: float) -> Iterator[None]:
    """Again and again, for so long."""
    deadline = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        yield


class _Lines:
    """Progress for people: one line that changes on a terminal, else some lines."""

    def __init__(self, stream: TextIO, interval: float) -> None:
        self._stream, self._interval = stream, interval
        self._in_place = stream.isatty()
        self._width, self._shown, self._at = 0, "", 0.0
        self._of: object = None

    def show(self, line: str, of: object) -> None:
        """Say what is done now; ``of`` changes with what is more than progress."""
        now = time.monotonic()
        if line == self._shown:
            return
        if self._in_place:
            new_line = "\n" if self._shown and of != self._of else ""
            print(f"{new_line}\r{line.ljust(self._width)}", end="", file=self._stream, flush=True)
        elif of == self._of and now - self._at < self._interval:
            return
        else:
            print(line, file=self._stream, flush=True)
        self._width, self._shown, self._of, self._at = len(line), line, of, now

    def end(self, line: str) -> None:
        """The last line."""
        start = "\n" if self._in_place and self._shown else ""
        print(f"{start}{line}", file=self._stream, flush=True)
