"""What is installed, in words: a package that is missing, and how to install it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = "requirements/run.txt"
_OURS = ("benchmarks", "convert", "deploy", "examples", "kt_kernel", "tests")


def how_to_install(root: Path = ROOT) -> str:
    """The advice to follow the word "found": by `make venv`, where this is a clone."""
    if (root / "Makefile").is_file() and (root / REQUIREMENTS).is_file():
        return "run `make venv`, then `.venv/bin/python` in place of `python3`"
    return f"install the packages of {REQUIREMENTS} and this one into the environment that runs it"


def missing_package(error: ImportError) -> str | None:
    """What a failed import says of the installation; None for a fault of another kind."""
    name = error.name or ""
    if isinstance(error, ModuleNotFoundError) and name.partition(".")[0] not in ("", *_OURS):
        expected, found = f"the packages of {REQUIREMENTS}", f"no {name}"
    elif name == "kt_kernel._ext" or (name == "kt_kernel" and "'_ext'" in str(error)):
        expected, found = "the compiled extension of kt_kernel", "none"
    else:
        return None
    return f"expected {expected}, found {found} for {sys.executable}: {how_to_install()}"
