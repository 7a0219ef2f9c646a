"""Files of a download that are on their way, and how much of a model is on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from deploy.hub.marker import RepoFile, file_size

#: Where unfinished files are: the folder in which the Hub's own client keeps its own.
FOLDER = Path(".cache/huggingface/download")


def partial_path(directory: Path, name: str, file: RepoFile) -> Path:
    """Where a file of a model directory is while it is on its way.

    The path stands for the name and for the content that the Hub lists: what another revision has
    under the same name is on its way somewhere else.
    """
    content = f"{name}\0{file.size}\0{file.sha256 or file.git_id}"
    return directory / FOLDER / f"{hashlib.sha256(content.encode()).hexdigest()}.incomplete"


def unfinished_files(directory: Path) -> list[Path]:
    """All unfinished files, also those of the Hub's own client."""
    return [path for path in (directory / FOLDER).rglob("*.incomplete") if path.is_file()]


def bytes_present(directory: Path, files: Mapping[str, RepoFile]) -> int:
    """Bytes of the wanted files that are on the disk, unfinished ones included."""
    total = 0
    for name, file in files.items():
        size = file_size(directory / name)
        if size is None:
            size = file_size(partial_path(directory, name, file)) or 0
        total += min(size, file.size)
    return total
