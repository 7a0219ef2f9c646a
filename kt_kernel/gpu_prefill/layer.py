"""One layer's calls divided between the card and the CPUs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel import _ext
from kt_kernel.calls import Batch, Queued
from kt_kernel.gpu_prefill.card import CardExperts, Running, count_ids, route
from kt_kernel.gpu_prefill.packed_layer import PackedLayer
from kt_kernel.layer_weights import LayerWeights


class Divided(NamedTuple):
    """A call of which the card computes some experts and the CPUs the others.

    Attributes:
        card: what all layers share.
        running: its part.
        cpu: the CPUs' part.
        engine: which computes it.
        before_ns: the engine's time of workers before it.
        tokens: int64 [E], of the experts that the CPUs compute.
    """

    card: CardExperts
    running: Running
    cpu: Queued
    engine: _ext.Engine
    before_ns: int
    tokens: NDArray[np.int64]

    def result(self) -> torch.Tensor:
        """Wait for the CPUs; the sum of both parts, [T, H], on the card's current stream."""
        cpu = self.cpu.result()
        self.card.learn_cpu((self.engine.totals["workers_ns"] - self.before_ns) / 1e9, self.tokens)
        return self.card.finish(self.running, cpu)


class LayerOnCard:
    """Divides the calls of one layer, and takes it from the card when this object goes.

    Not at the process's end, when CUDA may be gone, nor in a process that was forked, which has no
    card.

    Args:
        card: what all layers share; this one is added to it.
        layer: the packed experts.
        weights: the layer's, of which the engine computes the others. Which experts are residents
            may change between calls. What the card computes is counted there: the engine, which
            counts all others, does not get to see it.
        least_tokens: of a call, for the card to take part.
    """

    def __init__(
        self, card: CardExperts, layer: PackedLayer, weights: LayerWeights, least_tokens: int
    ) -> None:
        self.card, self._layer, self._engine = card, layer, weights.engine
        self._held, self._on_gpu, self._least_tokens = layer.held, weights.on_gpu, least_tokens
        self._counts = weights.counts_on_card
        card.add(layer)
        self._leave = weakref.finalize(self, _leave, card, layer, os.getpid())
        self._leave.atexit = False

    def takes(self, x: torch.Tensor) -> bool:
        """Whether a call with these hidden states may be divided.

        None may once another layer was added under this one's number: the card has its weights.
        """
        card = self.card
        fits = x.dtype == card.dtype and x.device == card.device
        return len(x) >= self._least_tokens and fits and card.has(self._layer)

    def forget(self) -> None:
        """Before this layer's weights change or go: the card has them no longer.

        Raises:
            RuntimeError: what CUDA refuses.
        """
        if self.card.has(self._layer):
            self.card.forget(self._layer.layer_idx)

    def all_on_card(self, batch: Batch, ids_here: torch.Tensor) -> torch.Tensor:
        """A call's experts, all of those that the CPUs hold, on the card; float32 [T, H] there.

        Args:
            batch: on the card; the CPUs hold every expert in it.
            ids_here: its ids, on the CPU.
        """
        counts = count_ids(ids_here, len(self._held))
        routed = route(batch.ids, batch.weights, counts)
        experts = np.flatnonzero(counts[1:]).tolist()
        running = self.card.run(self._layer.layer_idx, batch.x, routed, experts)
        return self.card.finish(
            running, torch.zeros(batch.x.shape, dtype=self.card.dtype, device="cpu")
        )

    def divide(
        self, batch: Batch, here: Batch, on_cpu: Callable[[Batch], Queued]
    ) -> Divided | None:
        """Start a call on both; None where the CPUs alone are to compute it.

        Args:
            batch: on the card.
            here: the same in main memory.
            on_cpu: starts a call of the CPUs.
        """
        ids = here.ids.numpy()
        experts = len(self._held)
        if ids.size == 0 or ids.min() < -1 or ids.max() >= experts:
            return None  # the CPUs' call says what is wrong
        counts = count_ids(here.ids, experts)
        tokens = counts[1:].copy()
        tokens[self._on_gpu] = 0
        chosen = self.card.choose(self._layer.layer_idx, tokens, self._on_gpu)
        if not chosen:
            return None
        on_card = np.zeros(experts + 1, bool)
        on_card[np.array(chosen) + 1] = True
        rest = torch.from_numpy(np.where(on_card[ids + 1], -1, ids))
        self._counts[chosen] += tokens[chosen]
        tokens[chosen] = 0
        before_ns = self._engine.totals["workers_ns"]
        cpu = on_cpu(here._replace(ids=rest))
        routed = route(batch.ids, batch.weights, counts)
        running = self.card.run(self._layer.layer_idx, batch.x.contiguous(), routed, chosen)
        return Divided(self.card, running, cpu, self._engine, before_ns, tokens)


def _leave(card: CardExperts, layer: PackedLayer, process: int) -> None:
    if os.getpid() == process:
        card.forget_late(layer)
