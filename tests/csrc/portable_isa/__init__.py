"""The avx512_vnni and amx targets on a CPU without AVX-512: the same source over stand-ins.

Their sources are compiled with include/immintrin.h first on the include path, whose intrinsics are
plain C++ and AVX2 (SIMDe, Debian's libsimde-dev). So this tests what the source says, to the bit;
the machine code of the real intrinsics is tested on a CPU that has them.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from pathlib import Path

from kt_kernel import _ext
from tests import shared_library

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[2] / "csrc"
AMX = FOLDER.parent / "amx"

#: What can_build asks for.
NEEDS = "needs AVX2 and SIMDe 0.7.4 or later (package libsimde-dev)"

TARGETS = ("amx", "avx512_vnni")
OPTIONS = [
    *("-O2", "-mavx2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"),
    "-Wno-pedantic",  # of #include_next
    *(f"-I{FOLDER / 'include'}", f"-I{CSRC}", f"-I{FOLDER.parent}"),
]


def is_needed() -> bool:
    """True on a CPU that runs neither target."""
    return not dict(_ext.cpu_features())["avx512_vnni"]


@functools.cache
def can_build() -> bool:
    """Whether the CPU has AVX2 and the compiler finds SIMDe with VNNI."""
    line = ["g++", "-E", "-x", "c++", "-include", "simde/x86/avx512/dpbusd.h", "/dev/null"]
    found = subprocess.run(line, capture_output=True, check=False).returncode == 0
    return found and dict(_ext.cpu_features())["avx2"]


@functools.cache
def library() -> ctypes.CDLL:
    sources = [*(CSRC / "targets" / f"{name}.cpp" for name in TARGETS), AMX / "programs.cpp"]
    headers = [path for folder in (FOLDER, CSRC, AMX) for path in folder.rglob("*.h")]
    return shared_library.load("portable-isa", sources, OPTIONS, headers)


@functools.cache
def install() -> None:
    """Make both targets run in this process."""
    for name in TARGETS:
        table = ctypes.c_char.in_dll(library(), f"_ZN2kt{len(name)}{name}7kernelsE")
        _ext.replace_target(ctypes.addressof(table))
