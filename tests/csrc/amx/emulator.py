"""Builds emulator.cpp and puts it in place of the tile unit that this CPU lacks."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from kt_kernel import _ext
from tests import shared_library

FOLDER = Path(__file__).parent


@functools.cache
def library() -> ctypes.CDLL:
    sources = [FOLDER / "emulator.cpp", FOLDER / "programs.cpp"]
    return shared_library.load("amx-emulator", sources, ["-O2"], FOLDER.glob("*.h"))


def is_native() -> bool:
    """True where the CPU has tiles and the kernel grants them."""
    features = dict(_ext.cpu_features())
    return features["amx_int8"] and features["amx_permitted"]


def can_emulate() -> bool:
    """The AMX target's other instructions are AVX-512's; those are not emulated."""
    return dict(_ext.cpu_features())["avx512_vnni"]


@functools.cache
def catch_instructions() -> None:
    """Make tile instructions work in this process."""
    if not is_native() and library().install() != 0:
        raise OSError("sigaction(SIGILL) failed")


def install() -> None:
    """Make the amx target run in this process."""
    catch_instructions()
    _ext.assume_target_supported("amx")
