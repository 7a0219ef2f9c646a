"""Builds emulator.cpp and puts it in place of the tile unit that this CPU lacks."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

from kt_kernel import _ext

SOURCE = Path(__file__).with_name("emulator.cpp")
COUNTERS = ("loadconfig", "storeconfig", "release", "zero", "load", "store", "product")


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator's library, compiled once for each state of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"kt-amx-emulator-{digest}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            fresh = Path(folder) / built.name
            options = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra"]
            subprocess.run(["g++", *options, str(SOURCE), "-o", str(fresh)], check=True)
            fresh.replace(built)
    return ctypes.CDLL(str(built))


def is_native() -> bool:
    """True where the CPU has tiles and the kernel grants them."""
    features = dict(_ext.cpu_features())
    return features["amx_int8"] and features["amx_permitted"]


def can_emulate() -> bool:
    """The AMX target's other instructions are AVX-512's; those are not emulated."""
    return dict(_ext.cpu_features())["avx512_vnni"]


@functools.cache
def install() -> None:
    """Make the amx target run in this process."""
    if library().install() != 0:
        raise OSError("sigaction(SIGILL) failed")
    _ext.assume_target_supported("amx")


def counts() -> dict[str, int]:
    """Emulated instructions by kind, since the process started."""
    values = (ctypes.c_int64 * len(COUNTERS))()
    library().read_counts(values)
    return dict(zip(COUNTERS, values, strict=True))
