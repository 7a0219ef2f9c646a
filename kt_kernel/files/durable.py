"""File operations that are still true after a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kt_kernel.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: Open a file to write to it. What a stranger may have put in its place is an error: a link, which
#: would lead to another file, or a pipe, whose reader would be waited for.
CREATE = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def write_error(path: Path, error: OSError) -> UserError:
    """The one line for an error while ``path`` was written."""
    if error.errno in _NO_SPACE:
        return UserError(
            f"no space left while writing {path}: free some and run the same command again, "
            f"finished layers are kept"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}")


@contextlib.contextmanager
def named_write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing ``path`` into the one line that a user can act on.

    Raises:
        UserError: the disk is full, the quota used up, or writing failed otherwise.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from None


def sync_directory(path: Path) -> None:
    """Flush a directory, so that a rename in it outlives a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """``pwrite`` until everything is written (one call may write less than asked)."""
    while data:
        count = os.pwrite(fd, data, offset)
        data = data[count:]
        offset += count


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file as a whole: a reader sees the old content or the new, nothing else."""
    temporary = path.with_name(path.name + ".tmp")
    with named_write_errors(path):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_TRUNC | CREATE, 0o644)
            try:
                write_fully(fd, memoryview(content), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.replace(path)
            sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
