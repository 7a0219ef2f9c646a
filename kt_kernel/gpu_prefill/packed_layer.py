"""A layer's packed experts in main memory, and how one of them lies in a slot of the ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel.gpu_prefill.expert_math import SliceInSlot
from kt_kernel.gpu_prefill.staging import Registered, StagedRows

_ALIGN = 256  # bytes; of a slice in a slot


@dataclass(frozen=True)
class PackedLayer:
    """A layer's packed experts in main memory.

    Args:
        layer_idx: decoder layer; calls follow each other in its order.
        slices: for each NUMA node's slice, uint8 [E, bytes of a slot].
        where: the slices in a slot of the ring.
        held: bool [E], experts whose weights are there.
        tables: int8 [256, 16] on the card, or None for int8.
        staged: by number of a slice, rows of it that go through staging buffers; the card reads
            the others by itself.
        registered: what lets it do so, until the layer is forgotten.
    """

    layer_idx: int
    slices: tuple[torch.Tensor, ...]
    where: tuple[SliceInSlot, ...]
    held: NDArray[np.bool_]
    tables: torch.Tensor | None
    staged: Mapping[int, StagedRows] = field(default_factory=dict)
    registered: Registered | None = None

    @property
    def slot_bytes(self) -> int:
        """Of one expert in a slot of the ring."""
        return sum(_aligned(part.shape[1]) for part in self.slices)

    def copy(self, expert: int, slot: torch.Tensor) -> None:
        """Start the copy of an expert into a slot."""
        at = 0
        for number, part in enumerate(self.slices):
            size = part.shape[1]
            target, staged = slot[at : at + size], self.staged.get(number)
            if staged is not None and staged.rows[expert]:
                staged.copy(part[expert], target)
            else:
                target.copy_(part[expert], non_blocking=True)
            at += _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def packed_layer(
    layer_idx: int,
    slices: Sequence[tuple[int, int, Sequence[Sequence[int]], NDArray[np.uint8]]],
    held: NDArray[np.bool_],
    tables: torch.Tensor | None,
) -> PackedLayer:
    """From what ``_ext.Layer.slices`` says."""
    where, tensors, base = [], [], 0
    for begin, end, parts, weights in slices:
        offsets = tuple((base + c, base + i, base + s) for c, i, s in parts)
        where.append(SliceInSlot(begin, end, offsets))
        tensors.append(torch.from_numpy(weights))
        base += _aligned(weights.shape[1])
    return PackedLayer(layer_idx, tuple(tensors), tuple(where), held, tables)
