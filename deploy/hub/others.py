"""A directory with somebody else's files: what a download without a marker would overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from convert.source.origin import MARKER_NAME
from deploy.hub.digests import Verifier
from deploy.hub.marker import Marker, RepoFile, file_size
from kt_kernel.errors import UserError

_WEIGHTS = ".safetensors"


def files_there(directory: Path, ours: Iterable[str]) -> list[str]:
    """Names in a directory besides ``ours`` and what file systems and the Hub's client make."""
    try:
        there = {path.name for path in directory.iterdir()}
    except OSError:  # there is none yet; or the lock's file says why it cannot be written
        return []
    return sorted(there - {*ours, MARKER_NAME, "lost+found", ".cache"})


def refuse_files_of_others(
    directory: Path, there: Iterable[str], listed: Mapping[str, RepoFile], small: Iterable[str]
) -> None:
    """Take only a directory with files of this repository, as an earlier download has them.

    Args:
        there: names of the directory.
        listed: the repository's files.
        small: those that are wanted besides weights: compared by content, weights by size.

    Raises:
        UserError: it holds a file of the same name that is another, or none of the repository's.
    """
    names = {name: listed[name] for name in there if name in listed}
    wanted = {name: names[name] for name in small if name in names}
    verifier = Verifier(directory, Marker("", "", "", wanted), with_content=True)
    bad = verifier.bad_files(wanted)
    bad += [
        name
        for name, file in names.items()
        if name.endswith(_WEIGHTS) and file_size(directory / name) != file.size
    ]
    if bad:
        raise UserError(
            f"KT_MODEL_PATH {directory} holds a {min(bad)} that is not this repository's: move it, "
            f"or set KT_MODEL_PATH to another directory"
        )
    if not names:
        raise UserError(
            f"KT_MODEL_PATH {directory} holds other files: expected an empty directory or an "
            f"earlier download, set KT_MODEL_PATH to one"
        )
