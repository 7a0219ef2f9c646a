"""python -m tests.csrc.amx.report: tile instructions of layer calls, counted and in closed form."""

from __future__ import annotations

import os
import sys

from kt_kernel import packed
from tests.csrc.amx import closed_form, tile_unit
from tests.layers import THREADS

KINDS = ("product", "load", "store", "zero", "loadconfig")
#: (tokens, hidden size, intermediate size)
CASES = [(16, 256, 192), (32, 256, 192), (33, 256, 192), (300, 64, 1088), (64, 1088, 2112)]


def how() -> str:
    """What counts the instructions here, or why nothing does."""
    if tile_unit.IS_EMULATED:
        return "Counted while emulating the machine code's tile instructions"
    if tile_unit.IS_PORTABLE:
        return "Counted in the source compiled with portable stand-ins for its intrinsics"
    reason = tile_unit.ABSENT or "this CPU has a tile unit of its own, which counts nothing"
    return f"Not counted: {reason}"


def main() -> int:
    """0 when every count is the closed form's, or nothing can be counted; else 1."""
    os.environ["KT_TARGET"] = "amx"
    if tile_unit.COUNTS:
        tile_unit.install()
    print(f"{how()}. One call, one expert, {THREADS} threads: ", end="")
    print("counted/closed form." if tile_unit.COUNTS else "closed form.")
    titles = "".join(f"{kind + 's':>16}" for kind in KINDS)
    print(f"{'method':10}{'tokens':>7}{'hidden':>8}{'interm.':>8}{titles}")
    differs = False
    for method in packed.METHODS:
        for case in CASES:
            expected = closed_form.layer(*case, method)
            found = closed_form.counted(*case, method) if tile_unit.COUNTS else expected
            differs = differs or found != expected
            cells = [str(expected[kind]) for kind in KINDS]
            if tile_unit.COUNTS:
                cells = [f"{found.get(kind, 0)}/{expected[kind]}" for kind in KINDS]
            tokens, hidden, intermediate = case
            row = "".join(f"{cell:>16}" for cell in cells)
            print(f"{method:10}{tokens:>7}{hidden:>8}{intermediate:>8}{row}")
    if differs:
        print("error: a count differs from the closed form", file=sys.stderr)
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
