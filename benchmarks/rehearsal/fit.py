"""Times of a few numbers of layers -> the time of all, with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A line through measured times, in seconds, taken at some number of layers.

    Attributes:
        layers: the number of layers.
        seconds: the line's value there.
        low, high: bounds of the mean there, at ``CONFIDENCE``; None with too few measurements.
        base: the line at no layers.
        per_layer: its slope.
        residual: the largest distance of a number's median from the line, as a share of it; None
            where the line goes through all points because there are only two numbers.
    """

    layers: int
    seconds: float
    low: float | None
    high: float | None
    base: float
    per_layer: float
    residual: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def extrapolate(samples: Mapping[int, Sequence[float]], layers: int) -> Estimate | None:
    """Least squares through all samples, number of layers -> seconds; None for a single number.

    Every number of layers counts the same, however often it was measured: each sample stands for
    its share of one. The interval is Student's for the mean at ``layers``, from the scatter of the
    samples around the line; what is not linear it does not know.
    """
    if len(samples) < 2:
        return None
    x = np.array([n for n, times in samples.items() for _ in times], float)
    y = np.array([t for times in samples.values() for t in times], float)
    weight = np.array([1 / len(times) for times in samples.values() for _ in times], float)
    weight *= len(x) / weight.sum()
    mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
    spread = float((weight * (x - mean_x) ** 2).sum())
    slope = float((weight * (x - mean_x) * (y - mean_y)).sum()) / spread
    base = float(mean_y - slope * mean_x)
    found = base + slope * layers
    low = high = None
    free = len(x) - 2
    if free > 0:
        variance = float((weight * (y - base - slope * x) ** 2).sum()) / free
        error = (variance * (1 / len(x) + (layers - float(mean_x)) ** 2 / spread)) ** 0.5
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, free)) * error
        low, high = found - half, found + half
    residual = None
    if len(samples) > 2:
        residual = max(
            abs(float(np.median(times)) / (base + slope * n) - 1) for n, times in samples.items()
        )
    return Estimate(layers, found, low, high, base, slope, residual)
