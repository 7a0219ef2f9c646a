"""The tile unit of the tests: the CPU's, an emulated one, or stand-ins for its intrinsics."""

from __future__ import annotations

import ctypes

from tests.csrc import portable_isa
from tests.csrc.amx import emulator

COUNTERS = ("loadconfig", "storeconfig", "release", "zero", "load", "store", "product")

IS_EMULATED = not emulator.is_native() and emulator.can_emulate()
IS_PORTABLE = portable_isa.is_needed() and portable_isa.can_build()
#: Whether instructions are counted: a real unit does not.
COUNTS = IS_EMULATED or IS_PORTABLE
#: Why no tile instruction runs here, or "".
ABSENT = ""
if not (COUNTS or emulator.is_native()):
    ABSENT = f"{portable_isa.NEEDS} where the CPU lacks AVX-512 VNNI"


def install() -> None:
    """Make the amx target run in this process, where one can."""
    if IS_EMULATED:
        emulator.install()
    elif IS_PORTABLE:
        portable_isa.install()


def library() -> ctypes.CDLL:
    """Has the counts."""
    return portable_isa.library() if IS_PORTABLE else emulator.library()


def counts() -> dict[str, int]:
    """Instructions by kind, since the process started."""
    values = (ctypes.c_int64 * len(COUNTERS))()
    library().read_counts(values)
    return dict(zip(COUNTERS, values, strict=True))
