"""``stress.cpp`` under each sanitizer; ``make sanitize`` runs it at length."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import compiler, native_program
from tests.csrc.stream import fake_cuda

#: Calls of a run; a release is worth more: KT_STRESS_CALLS=100000 make sanitize.
CALLS = os.environ.get("KT_STRESS_CALLS", "1000")

pytestmark = pytest.mark.sanitizer


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(tmp_path: Path, sanitizer: str) -> None:
    # Sanitizers' instrumented resolvers of function clones would run before they are ready.
    options = [f"-fsanitize={sanitizer}", "-O1", "-g", "-Dtarget_clones(...)=unused"]
    options += ["-Wno-error"]  # GCC's manual: sanitizers make more warnings false
    fake = tmp_path / "libfake.so"
    command = ["g++", "-std=c++20", "-fPIC", "-shared", *compiler.warnings(), *options]
    subprocess.run([*command, str(fake_cuda.SOURCE), "-o", str(fake)], check=True)
    link = [options[0], str(fake), f"-Wl,-rpath,{tmp_path}"]
    main = Path(__file__).with_name("stress.cpp")
    idle = ("amx", "avx2", "avx512_vnni", "reference")
    program = native_program.build(main, tmp_path, options, link, idle)
    # Captured calls and the stand-in's memory are for ever.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(
        [str(program), str(fake), CALLS], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "done\n"
    assert result.stderr == ""
