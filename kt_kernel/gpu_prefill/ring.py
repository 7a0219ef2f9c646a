"""Packed experts on their way to the card: a ring of slots, first in, first out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kt_kernel.gpu_prefill.streams import Stream


class Sent(NamedTuple):
    """An expert in a slot, or on its way there."""

    layer_idx: int
    expert: int
    slot: torch.Tensor
    arrived: Any  # a mark of the copies' stream


class Ring:
    """Slots in the card's memory, filled in turn by one stream and emptied by another.

    Args:
        slots: how many.
        slot_bytes: of each, at least one packed expert.
        device: where they are.
        copies, products: the streams that fill and empty them.
    """

    def __init__(
        self, slots: int, slot_bytes: int, device: torch.device, copies: Stream, products: Stream
    ) -> None:
        self._memory = torch.empty((slots, slot_bytes), dtype=torch.uint8, device=device)
        self._emptied: list[Any] = [None] * slots  # marks of the products' stream
        self._next = 0
        self._sent: deque[Sent] = deque()
        self._copies, self._products = copies, products

    @property
    def free(self) -> int:
        """Slots that ``send`` may fill."""
        return len(self._memory) - len(self._sent)

    def on_the_way(self, layer_idx: int) -> list[int]:
        """Experts of this layer that were sent and not taken, in their order."""
        return [sent.expert for sent in self._sent if sent.layer_idx == layer_idx]

    def send(self, layer_idx: int, expert: int, copy: Callable[[torch.Tensor], None]) -> None:
        """Put the copy into the next slot on the copies' stream; there is a free one."""
        index = self._next
        self._next = (index + 1) % len(self._memory)
        slot = self._memory[index]
        if (emptied := self._emptied[index]) is not None:
            self._copies.wait(emptied)
        self._copies.run(lambda: copy(slot))
        self._sent.append(Sent(layer_idx, expert, slot, self._copies.mark()))

    def take(self) -> Sent:
        """The first one; what follows on the products' stream finds it there."""
        sent = self._sent[0]
        self._products.wait(sent.arrived)
        return sent

    def give_back(self) -> None:
        """After what is on the products' stream, the slot of the expert taken may be filled."""
        index = (self._next - len(self._sent)) % len(self._memory)
        self._sent.popleft()
        self._emptied[index] = self._products.mark()

    @property
    def first(self) -> Sent | None:
        """The expert that was sent first, if any is there."""
        return self._sent[0] if self._sent else None

    def skip(self) -> None:
        """Forget the first one: copies are in order, so its slot is free to be filled."""
        self._sent.popleft()

    def clear(self) -> None:
        """Forget all that is on its way."""
        self._sent.clear()
