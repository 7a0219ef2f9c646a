"""Count how often each expert is used, from the first request on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kt_kernel.placement.metrics import start_counting
from kt_kernel.placement.saving import start_saving

if TYPE_CHECKING:
    from kt_kernel import KTMoEWrapper

_layers: list[KTMoEWrapper] = []


def remember(layers: Sequence[KTMoEWrapper]) -> None:
    """Take the model's layers, once they are loaded; a draft model has none."""
    _layers.extend(layers)


def count_from_now(scheduler: Any) -> None:
    """Before ``Scheduler.run_event_loop``: what ran until then was no user's token.

    That is the self-test, and the warm-up of CUDA graphs with one token for all.
    """
    if _layers:
        start_saving(_layers[0].model, {layer.layer_idx: layer.expert_counts for layer in _layers})
        if scheduler.server_args.enable_metrics:
            start_counting([layer.routed_pairs for layer in _layers])
