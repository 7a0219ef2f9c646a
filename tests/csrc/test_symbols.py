"""Target files are closed: what they export is their table and nothing else.

An inline function compiled with AVX-512 that the linker picks for the whole program would crash
every CPU without it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import native_program
from tests.compiler import ROOT

CSRC = ROOT / "csrc"
OPTIONS = native_program.target_options()
TARGETS = sorted({path.stem for path in (CSRC / "targets").glob("*.cpp")} - {"dispatch"})


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_table_is_exported(name: str, tmp_path: Path) -> None:
    obj = tmp_path / "target.o"
    options = OPTIONS.get(f"csrc/targets/{name}.cpp", [])
    # -O0 keeps every function out of line: the worst case for leaks.
    compile_line = ["g++", "-std=c++20", "-O0", "-fPIC", *options, f"-I{CSRC}", "-c"]
    source = CSRC / "targets" / f"{name}.cpp"
    subprocess.run([*compile_line, str(source), "-o", str(obj)], check=True)
    nm = ["nm", "--defined-only", "--extern-only", "--demangle", str(obj)]
    lines = subprocess.run(nm, check=True, capture_output=True, text=True).stdout.splitlines()
    exported = {line.split(maxsplit=2)[2] for line in lines}
    # The scalar files may share the library's inline functions: they are compiled for every CPU.
    if not options:
        exported = {symbol for symbol in exported if not symbol.startswith("std::")}
    assert exported == {f"kt::{name}::kernels"}
