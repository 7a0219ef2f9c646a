"""Locks of open files (``flock``): the kernel drops them with the last process that has the file.

Some file systems have none: Lustre mounted without ``flock``, NFS without its lock service. The
answer is the same wherever a lock is taken. What two processes at a time would damage, a directory
that one of them fills, is refused with :class:`CannotLock`. What only tells others, a stage's
state, the reserved CPUs, the counts of experts, goes on without a lock. ``convert/locks.py`` has
locks of another kind, between hosts; a conversion is refused, too.
"""

from __future__ import annotations

import errno
import fcntl

from kt_kernel.errors import UserError


class CannotLock(UserError):
    """The file system has no locks."""

    def __init__(self, where: object, error: OSError) -> None:
        reason = error.strerror or errno.errorcode.get(error.errno or 0, "")
        super().__init__(
            f"cannot lock a file in {where} ({reason}): choose a directory on a file system with "
            f"locks"
        )


def try_lock(fd: int, where: object, shared: bool = False) -> bool:
    """Lock an open file, or change the kind of the lock on it; whether it could be had at once.

    Args:
        where: the directory, and the setting that names it, for the error.
        shared: with others that share it, instead of alone.

    Raises:
        CannotLock: there can be no lock.
    """
    try:
        fcntl.flock(fd, _kind(shared) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise CannotLock(where, error) from None
    return True


def lock(fd: int, where: object, shared: bool = False) -> None:
    """As :func:`try_lock`, but waiting for it."""
    try:
        fcntl.flock(fd, _kind(shared))
    except OSError as error:
        raise CannotLock(where, error) from None


def unlock(fd: int) -> None:
    """Give the lock back before the file is closed."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def _kind(shared: bool) -> int:
    return fcntl.LOCK_SH if shared else fcntl.LOCK_EX
