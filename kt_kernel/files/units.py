"""Numbers for people: of bytes, and lists of indices."""

from __future__ import annotations

from collections.abc import Iterable

GIB = 2**30

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 1))


def gigabytes(count: float) -> str:
    """A byte count: ``688.6 GB``, ``1.3 MB``, ``12 bytes``."""
    unit, size = _unit_of(count)
    return f"{_in(count, size)} {unit}"


def gigabytes_of(done: int, total: int) -> str:
    """A part of a byte count, in one unit: ``12.3 of 688.6 GB``."""
    unit, size = _unit_of(total)
    return f"{_in(done, size)} of {_in(total, size)} {unit}"


def in_gib(count: float) -> str:
    """A byte count in GiB without the unit, as a card's memory is said: ``44.5``."""
    return f"{count / GIB:.1f}"


def ranges(numbers: Iterable[int], between: str = ",") -> str:
    """Indices as the kernel lists CPUs: ``0-3,8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return between.join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _unit_of(count: float) -> tuple[str, int]:
    return next((row for row in _UNITS if count >= row[1]), _UNITS[-1])


def _in(count: float, size: int) -> str:
    return f"{count / size:.1f}" if size > 1 else f"{count:.0f}"
