"""Progress in words, for logs and for people at a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from kt_kernel.files.units import gigabytes

#: Seconds between updates of the one line that a terminal shows.
TERMINAL_SECONDS = 1.0


class ProgressLines:
    """Prints ``<what> 12.3 GB of 688.6 GB (2%), 118.0 MB/s`` every ``interval`` seconds.

    On a terminal it is one line that changes every second. Use as a context manager around the
    work; ``done`` is asked for the bytes done so far.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: Callable[[], int],
        interval: float,
        stream: TextIO | None = None,
    ) -> None:
        self._what, self._total, self._done = what, total, done
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._interval = TERMINAL_SECONDS if self._in_place else interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def _run(self) -> None:
        last_done, last_time = self._done(), time.monotonic()
        while not self._stop.wait(self._interval):
            done, now = self._done(), time.monotonic()
            rate = max(0.0, (done - last_done) / (now - last_time))
            share = 100 * done / self._total if self._total else 100
            line = (
                f"{self._what} {gigabytes(done)} of {gigabytes(self._total)} ({share:.0f}%), "
                f"{gigabytes(rate)}/s"
            )
            # Blanks wipe out the rest of a longer line.
            start, end = ("\r", " " * 8) if self._in_place else ("", "\n")
            print(f"{start}{line}", end=end, file=self._stream, flush=True)
            last_done, last_time = done, now

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._in_place:
            print(file=self._stream)
