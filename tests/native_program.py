"""Builds programs from the whole of csrc but the bindings, with options of their own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import compiler
from tests.compiler import ROOT


def target_options() -> dict[str, list[str]]:
    """The options that CMakeLists.txt gives single files: those of their instruction sets."""
    described = re.findall(
        r'set_source_files_properties\((\S+) PROPERTIES\s+COMPILE_OPTIONS "([^"]+)"',
        (ROOT / "CMakeLists.txt").read_text(),
    )
    assert described, "CMakeLists.txt names no target's options"
    return {name: flags.split(";") for name, flags in described}


def build(
    main: Path,
    folder: Path,
    options: Sequence[str],
    link: Sequence[str],
    idle_targets: Collection[str] = (),
) -> Path:
    """Compile ``main`` with csrc into ``folder``; ``options`` are for all files.

    Targets that the program does not use (``idle_targets``) are compiled quickly, without them.

    Returns:
        Path of the program, named as ``main``.
    """
    of_target = target_options()
    command = ["g++", "-std=c++20", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    chosen = [*compiler.warnings(), *options]

    def compile_object(source: Path) -> Path:
        name = source.relative_to(ROOT).as_posix()
        out = folder / f"{name.replace('/', '-')}.o"
        flags = of_target.get(name, [])
        if name not in {f"csrc/targets/{target}.cpp" for target in idle_targets}:
            flags = [*flags, *chosen]
        subprocess.run([*command, *flags, "-c", str(source), "-o", str(out)], check=True)
        return out

    sources = [
        path for path in sorted((ROOT / "csrc").rglob("*.cpp")) if path.parent.name != "bindings"
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_object, [*sources, main]))
    program = folder / main.stem
    subprocess.run(["g++", *map(str, objects), *link, "-o", str(program)], check=True)
    return program
