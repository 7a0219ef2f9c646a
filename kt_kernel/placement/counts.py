"""How often tokens were routed to each expert of each layer, and what follows for the GPU's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kt_kernel.errors import UserError

#: int64 [E] for each MoE layer, by the decoder layer's index and the checkpoint's expert.
Counts = Mapping[int, NDArray[np.int64]]


@dataclass(frozen=True)
class Model:
    """What counts belong to.

    Attributes:
        fingerprint: of the checkpoint, as its packed layers' metadata have it; may be empty.
        num_experts: routed experts E of a layer.
    """

    fingerprint: str
    num_experts: int


def most_used(counts: NDArray[np.int64], resident: int) -> list[int]:
    """The ``resident`` experts with the largest counts, ascending; of equal ones the lower."""
    return sorted(np.argsort(-counts, kind="stable")[:resident].tolist())


def expert_order(counts: NDArray[np.int64], resident: int) -> list[int]:
    """The expert of each slot: the most used in the first ``resident``, then all others."""
    first = most_used(counts, resident)
    return first + sorted(set(range(len(counts))) - set(first))


def expert_map(counts: Counts, layers: int, num_experts: int, resident: int) -> list[list[int]]:
    """``physical_to_logical_map`` for SGLang, [layers, E]; layers without counts stay as they are.

    Raises:
        UserError: counts of a layer that the model does not have.
    """
    if beyond := [layer for layer in counts if layer >= layers]:
        raise UserError(f"there are counts of layer {max(beyond)}, but the model has {layers}")
    none = np.zeros(num_experts, np.int64)
    return [expert_order(counts.get(layer, none), resident) for layer in range(layers)]


@dataclass(frozen=True)
class Share:
    """What part of the routed (token, expert) pairs the GPU's experts take.

    Attributes:
        pairs: routed in all layers.
        first: part of them that experts ``0 .. resident - 1`` of each layer take.
        measured: part that the ``resident`` most used take, of the same pairs.
    """

    pairs: int
    first: float
    measured: float


def share_of(counts: Counts, resident: int) -> Share:
    """The shares of all layers together; 0 where nothing was routed."""
    pairs = int(sum(layer.sum() for layer in counts.values()))
    first = int(sum(layer[:resident].sum() for layer in counts.values()))
    best = int(sum(layer[most_used(layer, resident)].sum() for layer in counts.values()))
    return Share(pairs, first / max(pairs, 1), best / max(pairs, 1))
