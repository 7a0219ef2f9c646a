"""``KT_WEIGHT_CACHE``: packed weights on a disk of this host, copied from the shared one.

Each set of weights has a folder of its own there, named by the digest of its manifest, which has
the digests of all files: weights that were converted again are other weights. A server holds a lock
of its set, shared with the others of the host that load the same, until its process ends; the first
one copies. Sets that no server uses stay until their room is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from deploy.console import say
from deploy.copies.contents import packed_files
from deploy.copies.copying import CopiedFile, Copying, Progress, copy_groups, remove_unfinished
from deploy.copies.sums import SUMS_NAME, UNFINISHED_NAME, Record
from deploy.hub.marker import file_size
from deploy.progress_lines import ProgressLines
from deploy.state import COPYING, StageState
from kt_kernel.errors import UserError
from kt_kernel.files.durable import CREATE, named_write_errors
from kt_kernel.files.folders import nearest_existing
from kt_kernel.files.foreign import read_file
from kt_kernel.files.locks import CannotLock, lock, try_lock, unlock
from kt_kernel.files.units import gigabytes
from kt_kernel.packed import MANIFEST_NAME

SETTING = "KT_WEIGHT_CACHE"
PROGRESS_SECONDS = 30.0
POLL_SECONDS = 1.0
#: Looks at a set that is not whole and that servers hold, before it counts as damaged: one that
#: begins to copy holds it for a moment, too.
PATIENCE = 5
_KEY = re.compile(r"[0-9a-f]{32}")


def folder_of(cache: Path, weights: Path) -> Path:
    """Where the cache has a set of packed weights, or will have it.

    Raises:
        UserError: the weights have no manifest.
    """
    return cache / hashlib.sha256(read_file(weights / MANIFEST_NAME)).hexdigest()[:32]


def room(cache: Path, weights: Path, size: float) -> tuple[float, float]:
    """Bytes that a copy of the weights still takes, and bytes that it can get.

    Args:
        size: of the weights, while there are none.
    """
    try:
        folder = folder_of(cache, weights)
        files = [file for group in packed_files(weights) for file in group]
        needed = float(Copying(weights, folder, _record_of(folder), Progress()).missing(files))
        needed = 0.0 if _is_whole(folder, weights, files) else needed
    except UserError:
        folder, needed = cache, size
    idle = sum(_bytes_in(other) for other in _others(cache, folder))
    return needed, shutil.disk_usage(nearest_existing(cache)).free + idle


def local_copy(weights: Path, cache: Path, state: StageState | None) -> Path:
    """The folder of a host's own copy of the weights; makes it, or waits for who makes it.

    This process, and what it becomes, holds the copy's lock to its end.

    Raises:
        UserError: there is no room, the weights are damaged, or the cache cannot be written.
    """
    groups = packed_files(weights)
    files = [file for group in groups for file in group]
    folder = folder_of(cache, weights)
    with named_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        fd = _open_lock(folder)
    try:
        if _lock_alone(fd, folder, weights, files, state):
            if not _is_whole(folder, weights, files):
                _copy(weights, folder, groups, state)
            lock(fd, f"{SETTING} {cache}", shared=True)
        with contextlib.suppress(PermissionError):  # another user's
            os.utime(fd)  # the least recently used goes first
    except BaseException:
        os.close(fd)  # a stage that failed may stay, and begin anew
        raise
    os.set_inheritable(fd, True)
    say(f"{SETTING}: loading from {folder}")
    return folder


def _open_lock(folder: Path) -> int:
    """Open the lock of a set; that of another user's set cannot be written, which no lock needs."""
    try:
        return os.open(_lock_of(folder), os.O_RDWR | CREATE, 0o644)
    except PermissionError:
        with contextlib.suppress(FileNotFoundError):
            return os.open(_lock_of(folder), os.O_RDONLY | (CREATE & ~os.O_CREAT))
        raise


def _lock_alone(
    fd: int, folder: Path, weights: Path, files: list[CopiedFile], state: StageState | None
) -> bool:
    """Wait until this process has a set for itself, or shares one that is whole."""
    where = f"{SETTING} {folder.parent}"
    if try_lock(fd, where):
        return True
    tries = 0
    with contextlib.ExitStack() as stack:
        while not try_lock(fd, where):
            if try_lock(fd, where, shared=True):
                if _is_whole(folder, weights, files):
                    return False
                unlock(fd)
                tries += 1
                if tries > PATIENCE:
                    raise UserError(
                        f"{SETTING} {folder} is damaged, and a server uses it: expected all files "
                        f"of {weights}: end that server, and start again"
                    )
            elif tries == 0:
                say(f"{SETTING}: another server copies the weights to {folder}: waiting for it")
                if state is not None:
                    total = sum(file.size for file in files)
                    stack.enter_context(state.watch(COPYING, total, lambda: _bytes_in(folder)))
                tries = -PATIENCE
            time.sleep(POLL_SECONDS)
    return True


def _copy(
    weights: Path, folder: Path, groups: list[list[CopiedFile]], state: StageState | None
) -> None:
    """Copy what is missing; the manifest is the last."""
    files = [file for group in groups for file in group]
    with named_write_errors(folder):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        if (folder / SUMS_NAME).exists():
            (folder / SUMS_NAME).replace(folder / UNFINISHED_NAME)
    remove_unfinished(folder)
    record, progress = Record(folder / UNFINISHED_NAME), Progress()
    record.begin()
    copying = Copying(weights, folder, record, progress)
    missing, total = copying.missing(files), sum(file.size for file in files)
    _make_room(folder, missing)
    say(f"{SETTING}: copying {gigabytes(missing)} from {weights} to {folder}")
    with contextlib.ExitStack() as stack:
        if state is not None:
            stack.enter_context(state.watch(COPYING, total, lambda: progress.done))
        stack.enter_context(ProgressLines("copied", total, lambda: progress.done, PROGRESS_SECONDS))
        copy_groups(copying, groups)
    with named_write_errors(folder):
        record.path.replace(folder / SUMS_NAME)


def _make_room(folder: Path, needed: int) -> None:
    """Remove sets that no server uses, the least recently used first, while room is missing."""
    for other in sorted(_others(folder.parent, folder), key=_last_use):
        if shutil.disk_usage(folder).free >= needed:
            return
        try:
            fd = os.open(_lock_of(other), os.O_RDWR | CREATE, 0o644)
        except OSError:
            continue  # another user's
        try:
            if try_lock(fd, f"{SETTING} {folder.parent}"):
                say(f"{SETTING}: removing {other}, which no server uses, for room")
                shutil.rmtree(other, ignore_errors=True)
        finally:
            os.close(fd)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"not enough free space for {SETTING} {folder.parent}: expected {gigabytes(needed)}, "
            f"found {gigabytes(free)}; free some, choose another disk or unset it"
        )


def _others(cache: Path, folder: Path) -> Iterator[Path]:
    """The other sets that no server holds, and that this user may remove."""
    found = cache.iterdir() if cache.is_dir() else ()
    for path in found:
        if path == folder or not _KEY.fullmatch(path.name) or not path.is_dir():
            continue
        if os.access(path, os.W_OK) and not is_held(path):
            yield path


def is_held(folder: Path) -> bool:
    """Whether a server has a set, or nobody can tell."""
    try:
        fd = os.open(_lock_of(folder), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(fd, folder.parent)
    except CannotLock:
        return True
    finally:
        os.close(fd)


def _is_whole(folder: Path, weights: Path, files: list[CopiedFile]) -> bool:
    """Whether a set has all files in their sizes, and the manifest of the source."""
    try:
        if read_file(folder / MANIFEST_NAME) != read_file(weights / MANIFEST_NAME):
            return False
    except UserError:
        return False
    return all(file_size(folder / file.name) == file.size for file in files)


def _record_of(folder: Path) -> Record:
    name = SUMS_NAME if (folder / SUMS_NAME).exists() else UNFINISHED_NAME
    return Record(folder / name)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _last_use(folder: Path) -> float:
    try:
        return _lock_of(folder).stat().st_mtime
    except OSError:
        return 0.0


def _bytes_in(folder: Path) -> int:
    """Bytes of the files of a folder, of which some may come and go meanwhile."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                total += entry.stat().st_size
    return total
