"""``.kt-download.json``: which files of which commit a model directory holds, and if all are there.

The download writes it first with ``"complete": false``, so that a directory whose download was
interrupted is never taken for a model, and last with ``"complete": true``. Nothing in the finished
marker depends on time or host: an interrupted and repeated download ends with the same bytes.

It lies beside the files that it speaks of. A download writes no file of a repository whose name
begins with a dot, so none can take its place; and a marker that came another way is taken for
damaged if it names anything but files right in the directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.source.config import CONFIG_NAME
from convert.source.origin import MARKER_NAME
from kt_kernel.errors import UserError
from kt_kernel.files.durable import replace_file
from kt_kernel.files.foreign import Fields, FileMissing, NotJson, read_fields, shown
from kt_kernel.files.names import PLAIN, is_plain

FORMAT = "kt-download"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RepoFile:
    """A file as the Hub lists it.

    Attributes:
        size: bytes.
        sha256: of the content; empty for small files, of which the Hub knows a git hash only.
        git_id: git's object id (SHA-1) of the file or of its LFS pointer.
    """

    size: int
    sha256: str
    git_id: str


@dataclass
class Marker:
    """State of a model directory.

    Attributes:
        repo_id: repository on the Hub.
        requested_revision: branch, tag or commit that was asked for.
        revision: commit that it stands for.
        files: by path in the repository.
        with_code: the repository's Python files are among the files, if it has any.
        complete: every file was downloaded and verified.
        verified: while not complete: files whose content was checked, with the
            ``[size, mtime in ns]`` that it was checked at.
        received: while not complete: files that came whole from the Hub, each with its
            ``[size, mtime in ns]``; a file that was continued, or found, is not among them.
        stale: while not complete: files of an earlier revision, to be removed unless they belong
            to this one too.
    """

    repo_id: str
    requested_revision: str
    revision: str
    files: dict[str, RepoFile]
    with_code: bool = False
    complete: bool = False
    verified: dict[str, list[int]] = field(default_factory=dict)
    received: dict[str, list[int]] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size for file in self.files.values())

    def save(self, directory: Path) -> None:
        """Write the marker; it survives a power cut as a whole or not at all.

        Raises:
            UserError: the disk is full or the directory cannot be written.
        """
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "repo_id": self.repo_id,
            "requested_revision": self.requested_revision,
            "revision": self.revision,
            "with_code": self.with_code,
            "complete": self.complete,
            "total_bytes": self.total_bytes,
            "files": {name: asdict(self.files[name]) for name in sorted(self.files)},
        }
        if not self.complete:
            content["verified"] = dict(sorted(self.verified.items()))
            content["received"] = dict(sorted(self.received.items()))
            content["stale"] = sorted(self.stale)
        replace_file(directory / MARKER_NAME, (json.dumps(content, indent=1) + "\n").encode())

    def take_over(self, earlier: Marker, listed: Mapping[str, RepoFile], directory: Path) -> None:
        """Keep what is known of the files that are the same in this revision.

        Args:
            earlier: the marker that the directory has.
            listed: the files of this revision.
        """
        self.stale = sorted({*earlier.files, *earlier.stale})
        self.files = {n: file for n, file in earlier.files.items() if listed.get(n) == file}
        self.verified = {n: s for n, s in earlier.verified.items() if n in self.files}
        self.received = {n: s for n, s in earlier.received.items() if n in self.files}
        if earlier.complete:
            there = {*self.files} - {*self.missing(directory)}
            self.received = {name: stamp(directory / name) for name in there}

    def missing(self, directory: Path) -> list[str]:
        """Files that are not there, or not in their size."""
        return [
            name
            for name, file in sorted(self.files.items())
            if file_size(directory / name) != file.size
        ]


def _stamps(found: Fields, name: str) -> dict[str, list[int]]:
    stamps = found.inner(name, optional=True)
    return {file: stamps.integers(file) for file in stamps.values}


def stamp(path: Path) -> list[int]:
    """What tells a file that was not touched since: ``[size, mtime in ns]``."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def file_size(path: Path) -> int | None:
    """Size of a regular file in bytes, None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


class MarkerDamaged(UserError):
    """A marker that is not what this program wrote.

    :attr:`reason` is the message without the advice.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: run the download again, it makes a new one")
        self.reason = reason


def read_marker(directory: Path) -> Marker | None:
    """The marker of a directory, None if it has none.

    Raises:
        MarkerDamaged: there is one, but it is damaged.
        UserError: it cannot be read, or is of another program or version.
    """
    path = directory / MARKER_NAME
    try:
        found = read_fields(path)
        kind = found.values.get("format"), found.values.get("format_version")
        if kind == (FORMAT, FORMAT_VERSION):
            return _marker(found, path)
    except FileMissing:
        return None
    except NotJson as error:
        raise MarkerDamaged(str(error)) from None
    raise UserError(
        f"{path} is not a download marker of this version: delete it and download again, "
        f"finished files are recognised without it"
    )


def marker_or_none(directory: Path) -> Marker | None:
    """The marker of a directory, None if there is none that can be read."""
    try:
        return read_marker(directory)
    except UserError:
        return None


def is_whole_model(directory: Path) -> bool:
    """Whether a directory holds a whole model, as far as that shows without reading its data."""
    marker = marker_or_none(directory)
    if marker is None:
        return (directory / CONFIG_NAME).is_file()  # it came another way
    return marker.complete and not marker.missing(directory)


def _marker(found: Fields, path: Path) -> Marker:
    try:
        files = {
            name: RepoFile(f.integer("size"), f.text("sha256"), f.text("git_id"))
            for name, f in found.inner("files").each()
        }
        verified, received = _stamps(found, "verified"), _stamps(found, "received")
        stale = found.array("stale", [])
        if not all(isinstance(name, str) for name in stale):
            raise found.error("stale", "a list of texts")
        for name in (*files, *verified, *received, *stale):
            if not is_plain(name):
                raise UserError(f"{path} names {shown(name)}: expected {PLAIN}")
        complete = found.flag("complete")
        if complete and not any(name.endswith(".safetensors") for name in files):
            raise UserError(f"{path} says that all is there, and names no weights")
        return Marker(
            repo_id=found.text("repo_id"),
            requested_revision=found.text("requested_revision"),
            revision=found.text("revision"),
            files=files,
            with_code=found.flag("with_code", True),  # as all downloads once were
            complete=complete,
            verified=verified,
            received=received,
            stale=stale,
        )
    except UserError as error:
        raise MarkerDamaged(str(error)) from None
