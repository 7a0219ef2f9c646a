"""Files copied so that each is there whole, proven and for good, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from deploy.copies.sums import Record
from deploy.hub.marker import file_size
from kt_kernel.errors import UserError
from kt_kernel.files.durable import CREATE, named_write_errors, sync_directory, write_fully
from kt_kernel.files.foreign import open_regular
from kt_kernel.files.locks import try_lock

CHUNK_BYTES = 4 << 20
#: Files at a time. One thread hashes 0.5 to 2 GB/s; more than these keep spinning disks seeking.
THREADS = 4
_TEMPORARY = ".tmp-copy"


@dataclass(frozen=True)
class CopiedFile:
    """A file to copy.

    Attributes:
        name: below the source's directory and the target's.
        size: bytes.
        sha256: of its content; empty if nothing tells.
    """

    name: str
    size: int
    sha256: str = ""


class Stopped(Exception):
    """Another file's copy failed: this one is not wanted any more."""


class Progress:
    """Bytes that are copied or were there, for whoever tells people."""

    def __init__(self) -> None:
        self.done = 0
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many bytes more.

        Raises:
            Stopped: the copy is to end.
        """
        if self.stopped:
            raise Stopped
        with self._lock:
            self.done += count


def write_stream(
    read: Callable[[int], bytes], target: Path, progress: Progress, check: Callable[[str], None]
) -> str:
    """Write what ``read`` gives until it gives nothing; the SHA-256 of it.

    Args:
        read: gives at most so many bytes.
        check: gets the digest before the file gets its name, and raises if that is wrong.

    Raises:
        UserError: it cannot be written, or another run writes it; nothing is left.
    """
    temporary = target.with_name(f".{target.name}{_TEMPORARY}")
    digest = hashlib.sha256()
    fd = _open_new(temporary, target)
    try:
        try:
            offset = 0
            while chunk := read(CHUNK_BYTES):
                digest.update(chunk)
                with named_write_errors(target):
                    write_fully(fd, memoryview(chunk), offset)
                offset += len(chunk)
                progress.add(len(chunk))
            check(digest.hexdigest())
            with named_write_errors(target):
                os.fsync(fd)
        finally:
            os.close(fd)
        with named_write_errors(target):
            temporary.replace(target)
            sync_directory(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _open_new(temporary: Path, target: Path) -> int:
    """Make a file to write to. One that is there is another run's: leftovers are gone by now."""
    with named_write_errors(target):
        try:
            return os.open(temporary, os.O_WRONLY | os.O_EXCL | CREATE, 0o644)
        except FileExistsError:
            raise UserError(
                f"another run writes {target}: wait for it, and run the same command again"
            ) from None


def copy_file(source: Path, target: Path, sha256: str, progress: Progress) -> str:
    """Copy a file; the SHA-256 of it.

    Args:
        sha256: what it has to be; empty if nothing tells.

    Raises:
        UserError: it cannot be read or written, or is not what it should be; nothing is left.
    """

    def check(found: str) -> None:
        if sha256 and found != sha256:
            raise damaged(source, sha256, found)

    fd = open_regular(source)
    with os.fdopen(fd, "rb", 0) as file:

        def read(count: int) -> bytes:
            try:
                return file.read(count)
            except OSError as error:
                raise UserError(f"cannot read {source}: {error.strerror}") from None

        return write_stream(read, target, progress, check)


def damaged(path: Path, expected: str, found: str) -> UserError:
    """The error that a file's content is not what it should be."""
    return UserError(
        f"{path} is damaged: expected the SHA-256 {expected[:16]}..., found {found[:16]}...: "
        f"restore it from where it came"
    )


@dataclass(frozen=True)
class Copying:
    """A copy of files of one directory in another.

    Attributes:
        source, target: the directories; the target exists.
        record: what is finished.
        progress: counts the bytes.
        prefix: what the record's names of these files begin with.
    """

    source: Path
    target: Path
    record: Record
    progress: Progress
    prefix: str = ""

    def is_there(self, file: CopiedFile) -> bool:
        """Whether an earlier copy finished this very file, and it is still there.

        What nothing tells the digest of is small, and copied again.
        """
        known = self.record.digests.get(f"{self.prefix}{file.name}")
        if known is None or known != file.sha256:
            return False
        return file_size(self.target / file.name) == file.size

    def missing(self, files: Iterable[CopiedFile]) -> int:
        """Bytes of the files that are still to be copied."""
        return sum(file.size for file in files if not self.is_there(file))

    def one(self, file: CopiedFile) -> None:
        """Copy a file and add it to the record.

        Raises:
            UserError: it cannot be read or written, or is damaged.
        """
        target = self.target / file.name
        found = copy_file(self.source / file.name, target, file.sha256, self.progress)
        self.record.add(f"{self.prefix}{file.name}", found)


def copy_groups(copying: Copying, groups: Sequence[Sequence[CopiedFile]]) -> None:
    """Copy the files of each group, when those of the groups before are there."""
    for files in groups:
        copy_files(copying, files)


def copy_files(copying: Copying, files: Iterable[CopiedFile]) -> None:
    """Copy what is not there, several files at a time.

    Raises:
        UserError: the first thing that went wrong; what is finished stays.
    """
    todo, progress = [], copying.progress
    for file in files:
        if copying.is_there(file):
            progress.add(file.size)
        else:
            todo.append(file)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="copy") as pool:
        results = [pool.submit(copying.one, file) for file in todo]
        try:
            finished, _ = wait(results, return_when=FIRST_EXCEPTION)
            errors = [e for e in (r.exception() for r in finished) if e is not None]
        finally:
            progress.stopped = not all(r.done() for r in results)
            pool.shutdown(cancel_futures=True)
    for error in errors:
        if not isinstance(error, Stopped):
            raise error


@contextlib.contextmanager
def filled_alone(directory: Path, setting: str = "") -> Iterator[None]:
    """Have a directory that one process at a time fills; it is made if it is not there.

    Args:
        setting: that names it, for the error.

    Raises:
        UserError: another process fills it, or it cannot be written or locked.
    """
    with named_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not try_lock(fd, f"{setting} {directory}".lstrip()):
            raise UserError(f"another run fills {directory}: wait for it")
        yield
    finally:
        os.close(fd)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed copy left in a directory and in those below it."""
    for path in directory.rglob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
