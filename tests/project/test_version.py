"""The version stands in pyproject.toml; everything else asks for it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kt_kernel

REPOSITORY = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]

#: Ways to write a version down, whatever it is. SGLang's stand-in has one of its own.
DECLARATIONS = (
    r"__version__\s*=\s*[\"']\d(?!\.0\.0\+stand)",
    r"ARG VERSION=[\"']?\d",
    r"image\.version=[\"']?\d",
    r"VERSION:[-\s\"']*\$\{\w+:-\d",
    r"^project\([^)]*\bVERSION\b",
)


def tracked_files() -> list[Path]:
    """Files that are committed, or would be by `git add`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def places(pattern: str, files: list[Path]) -> list[str]:
    """Where the pattern is found, as file:line."""
    found = []
    for path in files:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for match in re.finditer(pattern, text, re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(REPOSITORY)}:{line}")
    return found


def test_no_second_place() -> None:
    # Versions of others may be equal, in the locked requirements and in results.
    files = [
        path
        for path in tracked_files()
        if path.name not in ("pyproject.toml", "CHANGELOG.md")
        and path.parent.name != "requirements"
        and path.suffix != ".json"
        and path != Path(__file__)
    ]
    assert len(files) > 100
    assert places(rf"(?<![\w.]){re.escape(VERSION)}(?![\w.]*\d)", files) == []
    for pattern in DECLARATIONS:
        assert places(pattern, files) == [], pattern


def test_second_places_are_found() -> None:
    examples = (
        '__version__ = "0.0.1"',
        "ARG VERSION=0.0.1",
        'image.version="0.0.1"',
        "  VERSION: ${IMAGE_VERSION:-0.0.1}",
        "project(kt_kernel VERSION 0.0.1 LANGUAGES CXX)",
    )
    for example, pattern in zip(examples, DECLARATIONS, strict=True):
        assert re.search(pattern, example), example


def test_the_installed_package_has_it() -> None:
    assert kt_kernel.__version__ == VERSION, "run make venv"
    said = subprocess.run(
        [sys.executable, "-m", "kt_kernel"], capture_output=True, check=True, text=True
    )
    assert f"{'kt_kernel:':<20}{VERSION}\n" in said.stdout


def test_the_changelog_ends_with_it() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.*?)\](?: - (.*))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == VERSION
    for name, date in headings[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", name)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date), name
