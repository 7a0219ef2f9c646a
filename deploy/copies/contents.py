"""Which files make a model's directory and one of packed weights, and what each has to be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from convert.source.origin import MARKER_NAME
from deploy.copies.copying import CopiedFile
from deploy.hub.marker import file_size, read_marker
from kt_kernel.errors import UserError
from kt_kernel.packed import MANIFEST_NAME


def model_files(directory: Path) -> list[list[CopiedFile]]:
    """The files of a downloaded model, in the groups in which they are to be copied.

    Nobody takes a directory for a model that has no ``config.json``, and the marker that says that
    all are there is the last.

    Raises:
        UserError: the directory does not hold a whole download.
    """
    marker = read_marker(directory)
    if marker is None or not marker.complete or marker.missing(directory):
        raise UserError(
            f"KT_MODEL_PATH {directory}: expected a finished download, found "
            f"{'none' if marker is None else 'an unfinished one'}: run `python entrypoint.py "
            f"download`, which recognises files that came another way"
        )
    files = [CopiedFile(name, file.size, file.sha256) for name, file in marker.files.items()]
    return in_groups([*files, CopiedFile(MARKER_NAME, (directory / MARKER_NAME).stat().st_size)])


def packed_files(directory: Path) -> list[list[CopiedFile]]:
    """The files of finished packed weights, in the groups in which they are to be copied.

    The last is the manifest, which says that all are there.

    Raises:
        UserError: the directory does not hold finished weights.
    """
    from convert import manifest_file  # it loads numpy

    path = directory / MANIFEST_NAME
    found = manifest_file.read_manifest(path)
    layers = manifest_file.read_layers(found)
    wrong = [r.file for r in layers.values() if file_size(directory / r.file) != r.bytes]
    if not found.flag("complete") or wrong:
        raise UserError(
            f"KT_WEIGHT_PATH {directory}: expected finished weights, found "
            f"{f'{wrong[0]} missing or of another size' if wrong else 'an unfinished conversion'}: "
            f"run `python entrypoint.py convert`"
        )
    files = [CopiedFile(r.file, r.bytes, r.sha256) for _, r in sorted(layers.items())]
    return in_groups([*files, CopiedFile(MANIFEST_NAME, path.stat().st_size)])


def in_groups(files: Iterable[CopiedFile]) -> list[list[CopiedFile]]:
    """The large files, the small ones, and what says that all are there."""
    groups: list[list[CopiedFile]] = [[], [], []]
    for file in files:
        last = file.name in (MARKER_NAME, MANIFEST_NAME)
        groups[2 if last else 0 if file.name.endswith(".safetensors") else 1].append(file)
    return groups
