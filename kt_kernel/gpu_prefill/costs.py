"""Which experts of a call stream to the card, by what an expert costs there and on the CPUs.

On the card an expert costs its bytes on the bus, whatever its tokens. On the CPUs it costs a part
for its bytes and a part for each of its tokens. So those with the most tokens stream, and as many
of them that both sides end together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Weight of the last call in the running figures.
_NEWEST = 0.2
#: Calls on the CPUs of which the two figures are fitted: as many layers as they drift slowly.
_FORGET = 0.9
#: A call streams if that saves this share of its time at least: below it, noise decides.
LEAST_GAIN = 0.05


@dataclass
class Costs:
    """What an expert costs, in seconds, corrected by each call.

    Args:
        card: an expert on its way to the card and through it.
        expert: an expert on the CPUs, whatever its tokens.
        token: a token of an expert there.
        launch: the calling thread's time to start a call on the card and to add its result.
        measured: whether the figures are of this machine.
    """

    card: float
    expert: float
    token: float
    launch: float = 1e-3
    measured: bool = False
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 3)))

    def learn_card(self, seconds: float, experts: int) -> None:
        """A call kept the card busy so long with so many experts."""
        if experts > 0 and math.isfinite(seconds) and seconds > 0:
            self.card += _NEWEST * (seconds / experts - self.card)

    def learn_cpu(self, seconds: float, experts: int, tokens: int) -> None:
        """A call kept the CPUs busy so long with so many experts and (token, expert) pairs.

        Least squares of the last calls, with the figures of before as one more observation each, so
        that calls which are all alike move both in proportion.
        """
        if experts <= 0 or not math.isfinite(seconds) or seconds <= 0:
            return
        # Relative errors: a long call says no more about the figures than a short one.
        x = np.array([experts, tokens]) / seconds
        self._sums *= _FORGET
        self._sums += np.column_stack((np.outer(x, x), x))
        now = np.array([self.expert, self.token])
        scaled = self._sums * np.column_stack((now, now, now))
        normal, right = scaled[:, :2] * now, scaled[:, 2]
        factor = np.linalg.solve(normal + 0.05 * np.eye(2), right + 0.05)
        self.expert, self.token = now * np.clip(factor, 0.5, 2.0)

    def cpu_seconds(self, tokens: NDArray[np.int64]) -> float:
        """Of experts with so many tokens each."""
        used = tokens[tokens > 0]
        return self.expert * len(used) + self.token * float(used.sum())

    def choose(
        self, tokens: NDArray[np.int64], may_stream: NDArray[np.bool_], there: list[int]
    ) -> list[int]:
        """Experts for the card, in the order of their way there.

        Args:
            tokens: int64 [E], of each expert of this call.
            may_stream: bool [E], those that the CPUs hold and the card can fetch.
            there: experts on their way already; those with tokens come first.

        Returns:
            Ids; empty where the CPUs alone are about as fast.
        """
        ready = [e for e in there if may_stream[e] and tokens[e] > 0]
        candidates = np.flatnonzero(may_stream & (tokens > 0))
        candidates = candidates[~np.isin(candidates, ready)]
        order = candidates[np.argsort(-tokens[candidates], kind="stable")]
        left = tokens.copy()
        left[~may_stream] = 0
        alone = self.cpu_seconds(left)
        left[ready] = 0
        first = self.cpu_seconds(left)
        saved = np.cumsum(self.expert + self.token * tokens[order])
        cpu = np.concatenate(([first], first - saved))
        # What is there has been on its way during the attention: about half of it is waited for.
        card = self.card * (0.5 * len(ready) + np.arange(len(order) + 1)) + self.launch
        both = np.maximum(card, cpu)
        if not ready:
            both[0] = cpu[0]  # nothing is started on the card
        best = int(np.argmin(both))
        if not ready and both[best] > (1 - LEAST_GAIN) * alone:
            return []
        return [*ready, *order[:best].tolist()]
