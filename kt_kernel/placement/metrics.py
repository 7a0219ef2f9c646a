"""Where routed (token, expert) pairs were computed, as a metric of Prometheus."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

METRIC = "kt_routed_pairs"
#: Seconds between updates; Prometheus asks every 15.
PAUSE = 5.0


class Pairs(NamedTuple):
    """Numbers of pairs, by where their experts were computed.

    Attributes:
        resident: by experts that lie on the GPU.
        streamed: by the card, of experts that were sent there for the call.
        cpu: by the CPUs.
    """

    resident: int
    streamed: int
    cpu: int


class PairsCounter:
    """Adds what layers compute from now on to the counter ``kt_routed_pairs_total{where=...}``.

    Args:
        layers: what returns the pairs of each, which only grow.
    """

    def __init__(self, layers: Sequence[Callable[[], Pairs]]) -> None:
        # Chooses how it shares values with other processes when it is imported, by what SGLang
        # sets then.
        from prometheus_client import Counter

        text = "Routed (token, expert) pairs by where the expert was computed."
        counter = Counter(METRIC, text, labelnames=["where"])
        self._counters = [counter.labels(where=where) for where in Pairs._fields]
        self._layers = layers
        self._told = self._sums()

    def _sums(self) -> list[int]:
        return [sum(column) for column in zip(*(read() for read in self._layers), strict=True)]

    def update(self) -> None:
        """Add what is new."""
        now = self._sums()
        for counter, sum_now, told in zip(self._counters, now, self._told, strict=True):
            counter.inc(max(0, sum_now - told))  # experts that the mask moves take theirs along
        self._told = now

    def keep_updating(self) -> None:
        """Update until the process ends."""
        while True:
            time.sleep(PAUSE)
            self.update()


def start_counting(layers: Sequence[Callable[[], Pairs]]) -> None:
    """Update the metric in the background."""
    counter = PairsCounter(layers)
    threading.Thread(target=counter.keep_updating, name="expert-metrics", daemon=True).start()
