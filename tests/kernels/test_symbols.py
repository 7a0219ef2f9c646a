"""Target files are closed: what they export is their table and nothing else.

An inline function compiled with AVX-512 that the linker picks for the whole program would crash
every CPU without it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
AVX512_VNNI = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
TARGETS = {
    "amx": [*AVX512_VNNI, "-mamx-tile", "-mamx-int8"],
    "scalar": [],
    "reference": [],
    "avx2": ["-mavx2"],
    "avx512_vnni": AVX512_VNNI,
}


def test_every_target_file_is_covered() -> None:
    files = {path.stem for path in (CSRC / "targets").glob("*.cpp")} - {"dispatch"}
    assert files == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_table_is_exported(name: str, tmp_path: Path) -> None:
    obj = tmp_path / "target.o"
    source = CSRC / "targets" / f"{name}.cpp"
    # -O0 keeps every function out of line: the worst case for leaks.
    compile_line = ["g++", "-std=c++20", "-O0", "-fPIC", *TARGETS[name], f"-I{CSRC}", "-c"]
    subprocess.run([*compile_line, str(source), "-o", str(obj)], check=True)
    nm = ["nm", "--defined-only", "--extern-only", "--demangle", str(obj)]
    lines = subprocess.run(nm, check=True, capture_output=True, text=True).stdout.splitlines()
    exported = {line.split(maxsplit=2)[2] for line in lines}
    # The scalar files may share the library's inline functions: they are compiled for every CPU.
    if not TARGETS[name]:
        exported = {symbol for symbol in exported if not symbol.startswith("std::")}
    assert exported == {f"kt::{name}::kernels"}
