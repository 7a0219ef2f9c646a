"""Locks of an output directory, for processes of one host and of several.

They are open-file-description locks on bytes of one file. The kernel drops them with the process
that holds them, however it ends, and NFS passes them on to its server; ``flock`` is local to a host
on some NFS mounts.
"""

from __future__ import annotations

import errno
import fcntl
import struct

DIRECTORY, MANIFEST = 0, 1  # bytes of the lock file; a layer's byte follows them
_FIRST_LAYER = 16


def layer_byte(layer_idx: int) -> int:
    """The byte of the lock file that stands for a layer."""
    return _FIRST_LAYER + layer_idx


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("@hhqqi0q", kind, 0, byte, 1, 0)  # struct flock; whence SEEK_SET, no pid


def try_lock(fd: int, byte: int, shared: bool = False) -> bool:
    """Lock a byte, or change the kind of the lock on it; whether it could be had at once.

    Raises:
        OSError: the file system has no locks.
    """
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, byte))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def lock(fd: int, byte: int) -> None:
    """Lock a byte, waiting for it.

    Raises:
        OSError: the file system has no locks.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, byte))


def unlock(fd: int, byte: int) -> None:
    """Give a byte free."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))
