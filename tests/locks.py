"""A file system without locks, as some are on clusters."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest


def refuse_locks(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOLCK) -> None:
    """Have each try to take a lock of a file fail, as that of Lustre without ``flock`` does."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
