"""Compiles libraries that tests load."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import compiler


def load(
    name: str, sources: Sequence[Path], options: Sequence[str], headers: Iterable[Path]
) -> ctypes.CDLL:
    """The library of ``sources``, compiled once for each state of them, ``headers`` and options."""
    options = [*compiler.warnings(), *options]
    digest = hashlib.sha256(" ".join(options).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    built = Path(tempfile.gettempdir()) / f"kt-{name}-{digest.hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            # No unique symbols: those would be one in all libraries that a process loads.
            command = ["g++", "-std=c++20", "-fPIC", "-fno-gnu-unique", *options]

            def compile_object(source: Path, out: Path) -> None:
                subprocess.run([*command, "-c", str(source), "-o", str(out)], check=True)

            with ThreadPoolExecutor() as pool:
                list(pool.map(compile_object, sources, objects))
            fresh = Path(folder) / built.name
            subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(fresh)], check=True)
            fresh.replace(built)
    return ctypes.CDLL(str(built))
