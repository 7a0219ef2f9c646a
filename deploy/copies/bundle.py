"""A bundle: a directory of parts with the checksums of all files, made in one run or in several."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from convert.source.origin import MARKER_NAME
from deploy.console import say
from deploy.copies.copying import (
    CopiedFile,
    Copying,
    Progress,
    copy_groups,
    filled_alone,
    remove_unfinished,
)
from deploy.copies.sums import SUMS_NAME, UNFINISHED_NAME, Record, read_sums, sha256_of
from deploy.progress_lines import ProgressLines
from kt_kernel.errors import UserError
from kt_kernel.files.durable import named_write_errors, replace_file, sync_directory
from kt_kernel.files.names import is_plain
from kt_kernel.files.units import gigabytes
from kt_kernel.packed import MANIFEST_NAME

MODEL, WEIGHTS, IMAGE, WHEELS, SOURCE = PARTS = ("model", "weights", "image", "wheels", "source")
INSTALL_NAME = "INSTALL.txt"
PROGRESS_SECONDS = 30.0

_INSTALL = """\
On the host without a network:

    sha256sum -c SHA256SUMS    # here; `unbundle` checks what it installs, too
    git clone source/*.bundle ~/deepseek-v32 && cd ~/deepseek-v32
    KT_MODEL_PATH=/data/model KT_WEIGHT_PATH=/data/weights make unbundle BUNDLE=/this/directory

docs/clusters.md says more.
"""


class Bundle:
    """A bundle that is being made; use it in :func:`opened`.

    Args:
        directory: where; it exists.
        record: of the finished files.
    """

    def __init__(self, directory: Path, record: Record) -> None:
        self._directory, self._record = directory, record

    def copy(self, part: str, source: Path, groups: Sequence[Sequence[CopiedFile]]) -> None:
        """Copy files into a part; those of the last group say that the part is whole.

        Raises:
            UserError: there is no room, or a file cannot be copied.
        """
        folder = self._folder(part)
        files = [file for group in groups for file in group]
        progress = Progress()
        copying = Copying(source, folder, self._record, progress, f"{part}/")
        self._record.forget(f"{part}/{file.name}" for file in groups[-1])
        require_room(folder, copying.missing(files))
        total = sum(file.size for file in files)
        with ProgressLines(part, total, lambda: progress.done, PROGRESS_SECONDS):
            copy_groups(copying, groups)
        self._only(part, [file.name for file in files])
        say(f"{part}: {len(files)} files, {gigabytes(total)}")

    def make(self, part: str, name: str, write: Callable[[Path, Progress], str]) -> None:
        """Make the one file of a part, unless it is there; its name follows from its content.

        Args:
            write: makes it and returns its SHA-256.
        """
        path = self._folder(part) / name
        if f"{part}/{name}" not in self._record.digests or not path.is_file():
            self._record.update({f"{part}/{name}": write(path, Progress())})
        self._only(part, [name])
        say(f"{part}: {name}, {gigabytes(path.stat().st_size)}")

    def fill(self, part: str, write: Callable[[Path], list[str]]) -> None:
        """Have a part's folder filled by a program that checks what is there.

        Args:
            write: fills the folder and returns the names of its files.
        """
        folder = self._folder(part)
        names = write(folder)
        self._record.update({f"{part}/{name}": sha256_of(folder / name) for name in names})
        self._only(part, names)

    def finish(self) -> None:
        """Give the checksums their name.

        Raises:
            UserError: a part that another run began is not whole.
        """
        for part, last in ((MODEL, MARKER_NAME), (WEIGHTS, MANIFEST_NAME)):
            begun = any(name.startswith(f"{part}/") for name in self._record.digests)
            if begun and f"{part}/{last}" not in self._record.digests:
                raise UserError(
                    f"{self._directory}/{part} is not finished, which an earlier run began: name "
                    f"the part `{part}`, too"
                )
        path = self._directory / INSTALL_NAME
        replace_file(path, _INSTALL.encode())
        self._record.update({INSTALL_NAME: sha256_of(path)})
        with named_write_errors(self._directory / SUMS_NAME):
            self._record.path.replace(self._directory / SUMS_NAME)
            sync_directory(self._directory)
        say(f"{self._directory} is whole: {len(self._record.digests)} files in {SUMS_NAME}")

    def _folder(self, part: str) -> Path:
        folder = self._directory / part
        with named_write_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def _only(self, part: str, names: Sequence[str]) -> None:
        """Remove what earlier runs put into a part and what is not of it any more."""
        kept = {f"{part}/{name}" for name in names}
        stale = [n for n in self._record.digests if n.startswith(f"{part}/") and n not in kept]
        if stale:
            self._record.forget(stale)
        for name in stale:
            (self._directory / name).unlink(missing_ok=True)


def foreign_name(names: Iterable[str]) -> str | None:
    """The first name in a file of checksums that is in no bundle: it may lead anywhere."""
    for name in names:
        part, _, plain = name.partition("/")
        in_a_part = part in PARTS and (is_plain(plain) or plain == MARKER_NAME)
        if not in_a_part and name != INSTALL_NAME:
            return name
    return None


def _is_new_or_a_bundle(directory: Path) -> bool:
    """Whether a directory is empty or holds a bundle; that has checksums of such names alone.

    Raises:
        UserError: the checksums are no such file.
    """
    there = [p for p in (directory / SUMS_NAME, directory / UNFINISHED_NAME) if p.exists()]
    if not there:
        return not {path.name for path in directory.iterdir()} - {"lost+found"}
    return all(foreign_name(read_sums(path)) is None for path in there)


def require_room(folder: Path, needed: int) -> None:
    """Raise UserError if a file system has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"not enough free space in {folder}: expected {gigabytes(needed)}, found "
            f"{gigabytes(free)}; free some or choose another disk"
        )


@contextmanager
def opened(directory: Path) -> Iterator[Bundle]:
    """A bundle in a directory that is empty or holds one, made by one process at a time.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """
    sums, unfinished = directory / SUMS_NAME, directory / UNFINISHED_NAME
    with filled_alone(directory):
        if not _is_new_or_a_bundle(directory):
            raise UserError(
                f"{directory} holds other files: expected an empty directory, or an earlier bundle"
            )
        if sums.exists():
            with named_write_errors(sums):
                sums.replace(unfinished)  # until all is there again
        remove_unfinished(directory)
        record = Record(unfinished)
        record.begin()
        yield Bundle(directory, record)
