"""Locks of files, and file systems without them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kt_kernel.files.locks import CannotLock, lock, try_lock, unlock
from tests.locks import refuse_locks


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def test_alone_or_shared(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "lock"), opened(tmp_path / "lock")
    try:
        assert try_lock(first, "here")
        assert not try_lock(second, "here", shared=True)
        lock(first, "here", shared=True)
        assert try_lock(second, "here", shared=True)
        assert not try_lock(first, "here")
        unlock(second)
        assert try_lock(first, "here")
    finally:
        os.close(first)
        os.close(second)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_no_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whatever word the file system has for it; one that slips through would be a traceback."""
    refuse_locks(monkeypatch, code)
    fd = opened(tmp_path / "lock")
    try:
        for take in (try_lock, lock):
            with pytest.raises(CannotLock) as found:
                take(fd, f"KT_MODEL_PATH {tmp_path}")
            assert str(found.value) == (
                f"cannot lock a file in KT_MODEL_PATH {tmp_path} ({os.strerror(code)}): choose a "
                f"directory on a file system with locks"
            )
    finally:
        os.close(fd)
