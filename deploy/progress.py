"""Progress of a download for logs, where the Hub client's bars would be noise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from deploy.marker import RepoFile

#: Where the Hub's client keeps unfinished files of a local directory.
CLIENT_FOLDER = Path(".cache/huggingface/download")


def gigabytes(count: float) -> str:
    """A byte count for people: ``688.6 GB``, ``1.3 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def unfinished_files(directory: Path) -> list[Path]:
    """Files that the Hub's client was writing when it stopped, or is writing now."""
    return [path for path in (directory / CLIENT_FOLDER).rglob("*.incomplete") if path.is_file()]


def bytes_present(directory: Path, files: dict[str, RepoFile]) -> int:
    """Bytes of the wanted files that are on the disk, unfinished ones included."""
    total = 0
    for name, file in files.items():
        try:
            total += min((directory / name).stat().st_size, file.size)
        except OSError:
            continue
    for path in unfinished_files(directory):
        try:
            stat = path.stat()
        except OSError:  # finished and renamed meanwhile
            continue
        total += min(stat.st_size, stat.st_blocks * 512)  # some transfers leave holes
    return min(total, sum(file.size for file in files.values()))


class ProgressLines:
    """Prints ``<what> 12.3 GB of 688.6 GB (2%), 118.0 MB/s`` every ``interval`` seconds.

    Use as a context manager around the work; ``done`` is asked for the bytes done so far.
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
        self._interval = interval
        self._stream = stream or sys.stderr
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def _run(self) -> None:
        last_done, last_time = self._done(), time.monotonic()
        while not self._stop.wait(self._interval):
            done, now = self._done(), time.monotonic()
            rate = max(0.0, (done - last_done) / (now - last_time))
            share = 100 * done / self._total if self._total else 100
            print(
                f"{self._what} {gigabytes(done)} of {gigabytes(self._total)} ({share:.0f}%), "
                f"{gigabytes(rate)}/s",
                file=self._stream,
                flush=True,
            )
            last_done, last_time = done, now

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
