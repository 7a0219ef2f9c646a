"""What a file of csrc includes: all that it uses, and only from the folders above its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import native_program
from tests.compiler import ROOT

CSRC = ROOT / "csrc"
#: As CONTRIBUTING.md has them: a folder includes only those named before it.
FOLDERS = ["base", "isa", "weights", "gemm", "expert", "targets"]
FOLDERS += ["threads", "moe", "stream", "bindings"]

#: Those of the target with the most instructions, so that tiles can be read, too.
OPTIONS = native_program.target_options()["csrc/targets/amx.cpp"]


def sources() -> list[Path]:
    return [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp")]


@pytest.mark.parametrize("header", sorted(CSRC.rglob("*-inl.h")), ids=lambda path: path.name)
def test_a_kernel_header_can_be_read_by_itself(header: Path, tmp_path: Path) -> None:
    including = tmp_path / "including.cpp"
    including.write_text(f'#include "{header}"\n')
    command = ["g++", "-std=c++20", "-fsyntax-only", *OPTIONS, f"-I{CSRC}", str(including)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_folders_include_those_above_them() -> None:
    assert {path.parent.name for path in sources()} == set(FOLDERS)
    upward = [
        f"{path.relative_to(CSRC)} includes {included}"
        for path in sources()
        for included in re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE)
        if FOLDERS.index(included.split("/")[0]) > FOLDERS.index(path.parent.name)
    ]
    assert upward == []
