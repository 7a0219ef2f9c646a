"""The few statistics that a benchmark's numbers go through, each in one place."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np


def median(values: Sequence[float]) -> float:
    """Median of at least one value."""
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """What that share of at least one value does not exceed, between neighbours by the line."""
    return float(np.quantile(values, share))


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median: 0.1 says that half the values lie within 10%.

    0.0 for fewer than two values, which have no spread.
    """
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median of ``values[i] / base[i]``: both were measured in round ``i``, side by side.

    A machine that slows down for some rounds slows both, so this is steadier than the ratio of the
    medians.

    Raises:
        ValueError: the lengths differ or are zero.
    """
    if len(values) != len(base) or not base:
        raise ValueError(f"{len(values)} and {len(base)} rounds: expected the same, at least one")
    return statistics.median(v / b for v, b in zip(values, base, strict=True))
