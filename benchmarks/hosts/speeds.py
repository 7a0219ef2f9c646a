"""Seconds that one host takes for a decode step and for a prompt."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.rehearsal.result import KIND
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import Fields, read_fields


@dataclass(frozen=True)
class Speeds:
    """What was measured of one host.

    Attributes:
        decode: requests that are answered together -> seconds of a step, which gives each a token.
        prefill: tokens of a prompt -> seconds to its first token.
    """

    decode: Mapping[int, float]
    prefill: Mapping[int, float]

    def step(self, requests: int) -> float:
        """Seconds of a decode step of so many requests."""
        return _between(self.decode, requests)

    def prompt(self, tokens: int) -> float:
        """Seconds to the first token of a prompt with nothing before it."""
        return _between(self.prefill, tokens)


def _between(points: Mapping[int, float], at: int) -> float:
    """The line through the two points around ``at``, or the two next to it; a lone point's value.

    Below the first point its own value holds: a shorter prompt reads most experts, too.
    """
    xs = sorted(points)
    if at <= xs[0] or len(xs) == 1:
        return points[xs[0]]
    right = min(max(bisect.bisect_left(xs, at), 1), len(xs) - 1)
    x0, x1 = xs[right - 1], xs[right]
    return points[x0] + (points[x1] - points[x0]) * (at - x0) / (x1 - x0)


#: docs/performance.md's H200 with 14 threads. Steps of 1 and 8 requests are the rehearsal's; those
#: of 16 and 32 as many times that of 8 as with 8 MoE layers (115 and 168 ms to 74). Prompts are
#: shared by card and CPUs: lines through 1 and 4 MoE layers with chunks of 4096, and for 4096
#: tokens the mean of the two that are given.
PUBLISHED = Speeds(
    {1: 0.125, 8: 0.528, 16: 0.82, 32: 1.20},
    {64: 1.4, 512: 1.8, 4096: 4.9},
)


def read_speeds(path: Path) -> Speeds:
    """What ``make rehearsal`` wrote (``--json``).

    Raises:
        BenchmarkError: it is no such file, or has no line through several numbers of layers.
    """
    try:
        found = read_fields(path)
        if found.text("kind", "") != KIND:
            raise BenchmarkError(f"{path}: expected the JSON of `make rehearsal`, found another")
        fits = found.inner("fits")
        decode, prefill = (_seconds(fits.inner(name)) for name in ("decode", "prefill"))
    except UserError as error:
        raise BenchmarkError(str(error)) from None
    if not decode or not prefill:
        raise BenchmarkError(
            f"{path} has no line through decode steps and prompts: rehearse with several --layers"
        )
    return Speeds(decode, prefill)


def _seconds(cells: Fields) -> dict[int, float]:
    return {int(count): cell.number("seconds") for count, cell in cells.each() if count.isdecimal()}
