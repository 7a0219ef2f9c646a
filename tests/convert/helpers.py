"""What several test modules need."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def convert_argv(source: Path, output: Path, *more: str) -> list[str]:
    """The command's arguments; ``more`` may repeat a flag, the last one counts."""
    return ["--input-path", str(source), "--output", str(output), "--cpuinfer-threads", "2", *more]


def directory_content(path: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
