"""What part of the routed (token, expert) pairs the GPU's experts take.

The server says at its start which file it counts into.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.placement.counts import Counts, share_of
from kt_kernel.placement.counts_file import read_any_counts
from kt_kernel.program import run_program


def report(counts: Counts, resident: int) -> str:
    """A line for each layer and one for all, ``resident`` experts of each on the GPU."""
    rows = [(f"layer {layer}", {layer: counts[layer]}) for layer in sorted(counts)]
    lines = [f"{'':<12}{'pairs':>14}{'first':>9}{'measured':>10}"]
    for name, layers in [*rows, ("all layers", counts)]:
        share = share_of(layers, resident)
        lines.append(f"{name:<12}{share.pairs:>14}{share.first:>9.1%}{share.measured:>10.1%}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m kt_kernel.placement", description=__doc__)
    parser.add_argument("file", type=Path, help="KT_EXPERT_COUNTS")
    parser.add_argument("resident", type=int, help="KT_NUM_GPU_EXPERTS")
    arguments = parser.parse_args()
    if arguments.resident < 0:
        parser.error(f"resident is {arguments.resident}: expected at least 0")
    try:
        print(report(read_any_counts(arguments.file), arguments.resident))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
