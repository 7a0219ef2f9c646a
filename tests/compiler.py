"""The warnings of C++ that tests compile: those of the extension, and errors where its are."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def warnings() -> list[str]:
    """Options of the compiler; STRICT is the Makefile's."""
    described = re.search(r"^set\(WARNINGS ([^)]+)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M)
    assert described is not None, "CMakeLists.txt sets no WARNINGS"
    return described[1].split() + (["-Werror"] if os.environ.get("STRICT") else [])
