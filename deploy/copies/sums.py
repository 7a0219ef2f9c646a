"""A file of checksums in the form of ``sha256sum -c``, and the record of an unfinished copy."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.files.durable import replace_file
from kt_kernel.files.foreign import FileMissing, open_regular, read_file

SUMS_NAME = "SHA256SUMS"
#: The same while not all files are there. ``sha256sum -c`` would take it for whole.
UNFINISHED_NAME = ".SHA256SUMS.unfinished"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class Record:
    """The files of a copy that are on the disk for good, each with its digest.

    Every change is durable at once. Threads may share it.

    Args:
        path: its file; what it says already counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self.digests = read_sums(path)
        except FileMissing:
            self.digests = {}

    def begin(self) -> None:
        """Have the file there before anything else, so that it tells whose the others are."""
        self.update({})

    def add(self, name: str, sha256: str) -> None:
        """Say that a file is there."""
        self.update({name: sha256})

    def update(self, digests: Mapping[str, str]) -> None:
        """Say that all these files are there, at once."""
        with self._lock:
            self.digests.update(digests)
            self._save()

    def forget(self, names: Iterable[str]) -> None:
        """Say that files are there no longer."""
        with self._lock:
            for name in names:
                self.digests.pop(name, None)
            self._save()

    def _save(self) -> None:
        lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(self.digests.items())]
        replace_file(self.path, "".join(lines).encode())


def read_sums(path: Path) -> dict[str, str]:
    """Names and SHA-256 digests of a file of checksums.

    Raises:
        FileMissing: there is none.
        UserError: it is another kind of file.
    """
    found = {}
    text = read_file(path).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"{path}:{number}: expected a SHA-256 digest, two blanks and a name, as of "
                f"sha256sum: restore it, or delete it and make the copy again"
            )
        found[match[2]] = match[1]
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
