"""Proves that downloaded files are what the Hub has."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.hub.marker import Marker, RepoFile
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import open_regular

CHUNK_BYTES = 4 << 20
#: Hashing one file at a time keeps no disk busy; more than this keeps spinning disks seeking.
THREADS = 4
SAVE_SECONDS = 20.0


class Verifier:
    """Checks the files of a marker and records the good ones in it.

    A file that was found good at the same size and mtime by an earlier, interrupted run is not
    read again.

    Args:
        directory: the model directory.
        marker: its marker, whose ``files`` are checked.
        with_content: compare the content's hash of every file; else only of those that did not
            come whole from the Hub: continued after an interruption, or found in the directory.
    """

    def __init__(self, directory: Path, marker: Marker, with_content: bool) -> None:
        self._directory, self._marker, self._with_content = directory, marker, with_content
        self._lock = threading.Lock()
        self._saved = time.monotonic()
        self.bytes_done = 0

    def bad_files(self, names: Iterable[str]) -> list[str]:
        """Check the named files; returns those that are missing, damaged or of another size."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
            results = pool.map(lambda name: (name, self._is_good(name)), names)
            return [name for name, good in results if not good]

    def _is_good(self, name: str) -> bool:
        file, path = self._marker.files[name], self._directory / name
        try:
            fd = open_regular(path)
        except UserError:
            return False
        try:
            stat = os.fstat(fd)
            stamp = [stat.st_size, stat.st_mtime_ns]
            if stat.st_size != file.size:
                return False
            known = self._marker.verified.get(name) == stamp
            read = not known and (self._with_content or self._marker.received.get(name) != stamp)
            if read and not self._has_content(fd, file):
                return False
            os.fsync(fd)  # the marker will vouch for it after a power cut, too
        except OSError:  # of the disk
            return False
        finally:
            os.close(fd)
        self._record(name, stamp if read or known else None, 0 if read else file.size)
        return True

    def _has_content(self, fd: int, file: RepoFile) -> bool:
        if file.sha256:
            digest, wanted = hashlib.sha256(), file.sha256
        else:  # git's object id of the file
            digest, wanted = hashlib.sha1(f"blob {file.size}\0".encode()), file.git_id
        offset = 0
        while chunk := os.pread(fd, CHUNK_BYTES, offset):
            digest.update(chunk)
            offset += len(chunk)
            with self._lock:
                self.bytes_done += len(chunk)
        return digest.hexdigest() == wanted

    def _record(self, name: str, stamp: list[int] | None, unread: int) -> None:
        with self._lock:
            self.bytes_done += unread
            if stamp is not None:
                self._marker.verified[name] = stamp
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._marker.save(self._directory)
                self._saved = time.monotonic()
