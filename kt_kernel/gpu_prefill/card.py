"""Prompts on the card and the CPUs together: experts stream to the card while the CPUs compute.

A call of many tokens uses nearly every expert, and an expert on the bus costs its bytes whatever
its tokens. So for such calls, outside CUDA graphs, part of a layer's experts travel as they lie
packed in main memory, are unpacked on the card and multiplied there; ``costs`` chooses which.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel.gpu_prefill import expert_math
from kt_kernel.gpu_prefill.costs import Costs
from kt_kernel.gpu_prefill.expert_math import ExpertMatrices
from kt_kernel.gpu_prefill.lock import LateLock
from kt_kernel.gpu_prefill.memory import ROWS, SLOTS
from kt_kernel.gpu_prefill.packed_layer import PackedLayer
from kt_kernel.gpu_prefill.ring import Ring, Sent
from kt_kernel.gpu_prefill.staging import StagingBuffers
from kt_kernel.gpu_prefill.streams import Stream

logger = logging.getLogger(__name__)

#: Share of experts with tokens from which on any expert is likely to get some.
_NEARLY_ALL = 0.9


class ExpertShape(NamedTuple):
    """Sizes of a layer's experts as the card needs them."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    block_k: int  # 0 for int8


class Running(NamedTuple):
    """The card's part of a call: float32 [T, H], and a mark of when it is there."""

    out: torch.Tensor
    done: Any


class Routed(NamedTuple):
    """A call's pairs on the card, grouped by expert.

    ``tokens`` int64 and ``weights`` float32 [T * k] are sorted by expert; those of expert e are
    ``begin[e]`` to ``begin[e + 1]``.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    begin: NDArray[np.int64]


def count_ids(ids: torch.Tensor, num_experts: int) -> NDArray[np.int64]:
    """[E + 1] how often -1 and each expert are in these ids, which are on the CPU."""
    return np.bincount(ids.numpy().ravel() + 1, minlength=num_experts + 1)


def route(ids: torch.Tensor, weights: torch.Tensor, counts: NDArray[np.int64]) -> Routed:
    """Group a call's pairs by expert.

    Args:
        ids: int [T, k] on the card, at least -1.
        weights: float32 [T, k] there.
        counts: int64 [E + 1] of the same ids, as ``count_ids`` has them.
    """
    order = torch.argsort(ids.flatten(), stable=True)
    return Routed(order // ids.shape[1], weights.flatten()[order], np.cumsum(counts))


@dataclass
class CardTotals:
    """What the calls so far have done; seconds are of each side while both may be at work."""

    calls: int = 0
    tokens: int = 0
    experts_on_card: int = 0
    experts_on_cpu: int = 0
    card_seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_sent: int = 0


class CardExperts:
    """The ring, the memory of products and the costs that all layers of a process share.

    Args:
        shape: of every layer.
        slot_bytes: of a packed expert.
        device: where the products are computed.
        dtype: of the matrices; calls with others are left to the CPUs.
        copies, products, results: streams of the device: of experts to it, of what is computed
            there, and of the CPUs' part of an output.
        costs: first figures.
        staging: for what is sent out of memory that the card cannot read.
        slots, rows: as in ``memory``.
    """

    def __init__(
        self,
        shape: ExpertShape,
        slot_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
        copies: Stream,
        products: Stream,
        results: Stream,
        costs: Costs,
        staging: StagingBuffers,
        slots: int = SLOTS,
        rows: int = ROWS,
    ) -> None:
        self.shape, self.device, self.dtype, self.costs = shape, device, dtype, costs
        self.staging = staging
        self.totals = CardTotals()
        self.copies, self._products, self._results = copies, products, results
        self._ring = Ring(slots, slot_bytes, device, copies, products)
        self._layers: dict[int, PackedLayer] = {}
        self._last: dict[int, NDArray[np.int64]] = {}  # tokens of each expert in the last call
        self._lock = LateLock(copies.may_finish)
        self._timed: tuple[Any, Any, int] | None = None
        hidden, intermediate = shape.hidden_size, shape.intermediate_size

        def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._matrices = ExpertMatrices(
            empty(2 * intermediate, hidden),
            empty(hidden, intermediate),
            empty(2 * intermediate, dtype=torch.float32),
            empty(hidden, dtype=torch.float32),
        )
        self._cpu_part = empty(0, hidden)
        self._added: Any = None  # a mark: the last CPUs' part has been added
        self._returning: torch.Tensor | None = None
        self._x, self._y = empty(rows, hidden), empty(rows, hidden)
        self._gate_up, self._h = empty(rows, 2 * intermediate), empty(rows, intermediate)

    def add(self, layer: PackedLayer) -> None:
        """Make a layer known, in place of one with its number."""
        self.forget(layer.layer_idx)
        with self._lock:
            self._layers[layer.layer_idx] = layer

    def forget(self, layer_idx: int) -> None:
        """Unregister a layer, if there is one: its weights may be overwritten or freed after this.

        Raises:
            RuntimeError: what CUDA refuses.
        """
        with self._lock:
            if layer_idx in self._layers:
                self._forget(self._layers[layer_idx])

    def forget_late(self, layer: PackedLayer) -> None:
        """The same for a finalizer, if it is still this very layer: it may be done a little later.

        What CUDA refuses is logged.
        """

        def forget() -> None:
            try:
                if self._layers.get(layer.layer_idx) is layer:
                    self._forget(layer)
            except RuntimeError as error:
                logger.warning(
                    "kt_kernel: layer %d is gone, and its memory stays registered with CUDA: %s",
                    layer.layer_idx,
                    error,
                )

        self._lock.when_free(forget)

    def _forget(self, layer: PackedLayer) -> None:
        # Its experts would pass for the next one's of this number. Others are sent again.
        self._ring.clear()
        self._last.pop(layer.layer_idx, None)
        self.copies.finish()  # which read its memory
        self._products.finish()
        del self._layers[layer.layer_idx]
        if layer.registered is not None:
            layer.registered.release()

    def has(self, layer: PackedLayer) -> bool:
        """Whether this very layer was added, and not forgotten since."""
        with self._lock:
            return self._layers.get(layer.layer_idx) is layer

    def choose(
        self, layer_idx: int, tokens: NDArray[np.int64], on_gpu: NDArray[np.bool_]
    ) -> list[int]:
        """Experts of a call that the card should compute, in order; none if that gains nothing.

        Args:
            layer_idx: a layer that was added.
            tokens: int64 [E], of each expert.
            on_gpu: bool [E], resident experts, which are nobody's here.
        """
        with self._lock:
            self._learn_card()
            layer = self._layers[layer_idx]
            there = self._ring.on_the_way(layer_idx)
            return self.costs.choose(tokens, layer.held & ~on_gpu, there)

    def run(
        self, layer_idx: int, x: torch.Tensor, routed: Routed, experts: Sequence[int]
    ) -> Running:
        """Put the experts' copies and products on their streams, and the next layer's first copies.

        Args:
            layer_idx: the layer.
            x: [T, H] on the device, in ``dtype``; it is read on the products' stream.
            routed: the call's pairs.
            experts: from ``choose``, in its order.

        Returns:
            For ``finish``: the sum of routing weight times expert, on the device.
        """
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with self._lock:
            layer = self._layers[layer_idx]
            self._products.run(out.zero_)
            try:
                sent = self._multiply_all(layer, x, routed, experts, out)
                self._last[layer_idx] = np.diff(routed.begin)
                self._prefetch(layer_idx, len(experts))
            except BaseException:
                # Nothing may still write to a slot that is filled again, or read it.
                self.copies.finish()
                self._products.finish()
                self._ring.clear()
                raise
            self.totals.calls += 1
            self.totals.tokens += len(x)
            self.totals.experts_on_card += len(experts)
            self.totals.bytes_sent += sent * layer.slot_bytes
            return Running(out, self._products.mark())

    def finish(self, running: Running, cpu: torch.Tensor) -> torch.Tensor:
        """Add the CPUs' part, [T, H]; the sum in its dtype, for the device's current stream."""
        with self._lock:
            self._results.finish()  # the copy before this one, long over
            self._returning = cpu  # whose memory must not be written to before it is copied
            if len(self._cpu_part) < len(cpu):
                self._products.finish()
                self._cpu_part = torch.empty(cpu.shape, dtype=self.dtype, device=self.device)
                self._added = None
            part = self._cpu_part[: len(cpu)]
            if self._added is not None:
                self._results.wait(self._added)
            # Beside the products, which may have some way to go.
            self._results.run(lambda: part.copy_(cpu, non_blocking=True))
            self._products.wait(self._results.mark())
            self._products.wait(running.done)  # the current stream may be another one by now
            result = torch.empty(cpu.shape, dtype=cpu.dtype, device=self.device)
            self._products.run(lambda: result.copy_(running.out.add_(part)))
            self._added = self._products.mark()
            self._products.hand_over()
            return result

    def learn_cpu(self, seconds: float, tokens: NDArray[np.int64]) -> None:
        """The CPUs have needed so long for experts of so many tokens each."""
        with self._lock:
            used = int((tokens > 0).sum())
            self.costs.learn_cpu(seconds, used, int(tokens.sum()))
            self.totals.experts_on_cpu += used
            self.totals.cpu_seconds += seconds

    def _multiply_all(
        self,
        layer: PackedLayer,
        x: torch.Tensor,
        routed: Routed,
        experts: Sequence[int],
        out: torch.Tensor,
    ) -> int:
        """Returns how many experts had to be sent."""
        ring, wanted = self._ring, set(experts)
        there = ring.on_the_way(layer.layer_idx)
        waiting = deque(e for e in experts if e not in there)
        count = len(waiting)
        begin = self.copies.mark(timed=True)

        def wants(sent: Sent) -> bool:
            return sent.layer_idx == layer.layer_idx and sent.expert in wanted

        def fill() -> None:
            while waiting and ring.free:
                expert = waiting.popleft()
                ring.send(layer.layer_idx, expert, functools.partial(layer.copy, expert))

        while ring.first is not None and not wants(ring.first):
            ring.skip()
        fill()
        while ring.first is not None:
            if not wants(ring.first):
                ring.skip()
                continue
            sent = ring.take()
            self._products.run(functools.partial(self._unpack, layer, sent.slot))
            ring.give_back()
            fill()
            first, last = routed.begin[sent.expert], routed.begin[sent.expert + 1]
            for piece in range(first, last, len(self._x)):
                rows = slice(piece, min(piece + len(self._x), last))
                self._products.run(
                    functools.partial(
                        self._multiply, x, routed.tokens[rows], routed.weights[rows], out
                    )
                )
        self._timed = begin, self._products.mark(timed=True), count
        return count

    def _unpack(self, layer: PackedLayer, slot: torch.Tensor) -> None:
        for where in layer.where:
            expert_math.unpack(slot, where, layer.tables, self.shape.block_k, self._matrices)

    def _multiply(
        self, x: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Add the expert in ``_matrices``, for some of its tokens."""
        count, matrices = len(tokens), self._matrices
        rows = torch.index_select(x, 0, tokens, out=self._x[:count])
        gate_up = torch.mm(rows, matrices.gate_up.t(), out=self._gate_up[:count])
        h = self._h[:count]
        expert_math.swiglu(gate_up, matrices.gate_up_scale, h)
        y = torch.mm(h, matrices.down.t(), out=self._y[:count])
        expert_math.accumulate(y, matrices.down_scale, tokens, weights, out)

    def _prefetch(self, layer_idx: int, most: int) -> None:
        """Send the next layer's likely experts: during its attention the bus is idle."""
        following = self._layers.get(min((i for i in self._layers if i > layer_idx), default=-1))
        if following is None:
            return
        last = self._last.get(following.layer_idx)
        # Before the first call it is enough that about every expert gets tokens.
        likely = following.held.astype(np.int64) if last is None else last * following.held
        if last is None and (self._last[layer_idx] > 0).mean() < _NEARLY_ALL:
            return
        order = np.argsort(-likely, kind="stable")[: min(most, self._ring.free)]
        for expert in order[likely[order] > 0].tolist():
            copy = functools.partial(following.copy, expert)
            self._ring.send(following.layer_idx, expert, copy)

    def _learn_card(self) -> None:
        if self._timed is None:
            return
        begin, end, count = self._timed
        seconds = self._products.seconds(begin, end)
        if seconds is not None:
            self._timed = None
            self.costs.learn_card(seconds, count)
            self.totals.card_seconds += seconds
