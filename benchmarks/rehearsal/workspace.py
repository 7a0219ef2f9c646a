"""Folders for big files that go with the program, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PREFIX = "kt-rehearsal-"


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, removed at the end; as :func:`workspaces`."""
    with workspaces([parent]) as (folder,):
        yield folder


@contextmanager
def workspaces(parents: Sequence[Path]) -> Iterator[list[Path]]:
    """A new folder in each of ``parents``, the same for the same parent, removed at the end.

    What a killed run left is removed first. SIGTERM and SIGHUP unwind like Ctrl-C; while files go,
    further ones wait.
    """
    folders = {parent: parent / f"{PREFIX}{os.getpid()}" for parent in parents}
    for parent in folders:
        remove_left(parent)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _unwind) for number in numbers}
    try:
        for folder in folders.values():
            folder.mkdir()
        yield [folders[parent] for parent in parents]
    finally:
        everything = (signal.SIGINT, *numbers)
        held = {number: signal.signal(number, signal.SIG_IGN) for number in everything}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        for number, handler in (held | before).items():
            signal.signal(number, handler)


def _unwind(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def remove_left(parent: Path) -> None:
    """Remove the folders of runs whose process is gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        number = folder.name.removeprefix(PREFIX)
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            with suppress(OSError):
                shutil.rmtree(folder)
