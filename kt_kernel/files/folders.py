"""Folders that are still to be made."""

from __future__ import annotations

from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
