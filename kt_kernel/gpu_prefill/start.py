"""Whether prompts use the card, what the layers of a process share for it, and its first costs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel import _ext, packed
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill.card import CardExperts, ExpertShape
from kt_kernel.gpu_prefill.costs import Costs
from kt_kernel.gpu_prefill.layer import LayerOnCard
from kt_kernel.gpu_prefill.packed_layer import PackedLayer, packed_layer
from kt_kernel.gpu_prefill.staging import Registration, StagingBuffers, registering
from kt_kernel.gpu_prefill.streams import CudaStream, DirectStream, Stream
from kt_kernel.layer_weights import LayerWeights
from kt_kernel.stream import stream_context

logger = logging.getLogger(__name__)

#: Tokens of a call from which on experts may stream to the card: a number, auto or none.
THRESHOLD_VARIABLE = "KT_GPU_PREFILL_TOKEN_THRESHOLD"
#: With auto: calls of fewer tokens are over before the first experts are there.
AUTO_THRESHOLD = 64

#: A call of the CPUs' experts on tensors of the CPU: x, ids, weights -> output.
CpuCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: A dtype of activations, for tests: the CPU then stands in for the card, in plain PyTorch.
STAND_IN_VARIABLE = "_KT_GPU_PREFILL_STAND_IN"

_MEASURED_COPIES = 8
_MEASURED_EXPERTS, _MEASURED_TOKENS = 16, (32, 256)


def threshold() -> int | None:
    """Tokens from which on a call may use the card, from the environment; None for never.

    Raises:
        UserError: the variable is neither a number of at least 1 nor ``auto`` or ``none``.
    """
    text = os.environ.get(THRESHOLD_VARIABLE, "auto").strip().lower()
    if text == "none":
        return None
    if text in ("auto", ""):
        return AUTO_THRESHOLD
    if text.isascii() and text.isdigit() and 1 <= int(text[:10]) <= 2**31:
        return int(text)
    raise UserError(f"{THRESHOLD_VARIABLE} is {text!r}: expected a number of tokens, auto or none")


@functools.cache
def registration(device: torch.device, _process: int) -> Registration:
    """What has become of the memory of this process's layers."""
    return Registration(registering(_context(device)))


def _context(device: torch.device) -> _ext.StreamContext | None:
    return stream_context() if device.type == "cuda" else None


@functools.cache
def card_experts(
    shape: ExpertShape,
    slot_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    engine: _ext.Engine,
    _process: int,
) -> CardExperts:
    """What all layers of this shape share on a device; its costs are still to be measured."""
    streams = _streams(device)
    guess = Costs(card=1e-3, expert=1e-3, token=1e-4)
    staging = StagingBuffers(_context(device), engine.cpus)
    return CardExperts(shape, slot_bytes, device, dtype, *streams, guess, staging)


def _streams(device: torch.device) -> tuple[Stream, Stream, Stream]:
    if device.type == "cpu":
        return DirectStream(), DirectStream(), DirectStream()
    copies, results = (CudaStream(torch.cuda.Stream(device), device) for _ in range(2))
    return copies, CudaStream(None, device), results


def _card() -> tuple[torch.device, torch.dtype] | None:
    """The device that takes part, and the dtype of its calls; None without one."""
    if stand_in := os.environ.get(STAND_IN_VARIABLE):
        return torch.device("cpu"), {"float32": torch.float32, "bfloat16": torch.bfloat16}[stand_in]
    if not torch.cuda.is_initialized():
        return None
    return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16


def measure_card(layer: PackedLayer, card: CardExperts) -> float:
    """Seconds of an expert's copy, of a few that follow each other."""
    held = np.flatnonzero(layer.held)[:_MEASURED_COPIES].tolist()
    slot = torch.empty(layer.slot_bytes, dtype=torch.uint8, device=card.device)
    copies = card.copies
    copies.run(lambda: layer.copy(held[0], slot))
    copies.finish()
    started = time.monotonic()
    for expert in held:
        copies.run(functools.partial(layer.copy, expert, slot))
    copies.finish()
    return (time.monotonic() - started) / len(held)


def measure_cpu(
    call: CpuCall, hidden_size: int, top_k: int, held: NDArray[np.bool_]
) -> tuple[float, float]:
    """Seconds of an expert and of a token of an expert on the CPUs, from two calls."""
    experts = np.flatnonzero(held)[:_MEASURED_EXPERTS]
    top_k = min(top_k, len(experts))
    generator = torch.Generator("cpu").manual_seed(0)
    seconds = []
    for tokens in (_MEASURED_TOKENS[0], *_MEASURED_TOKENS):  # the first one wakes the workers
        x = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float32, device="cpu")
        order = np.resize(experts, (tokens, top_k)) if top_k else np.empty((tokens, 0))
        ids = torch.from_numpy(order.astype(np.int32))
        weights = torch.full((tokens, top_k), 1.0, dtype=torch.float32, device="cpu")
        started = time.monotonic()
        call(x.to(torch.bfloat16), ids, weights)
        seconds.append(time.monotonic() - started)
    few, many = (tokens * top_k for tokens in _MEASURED_TOKENS)
    token = max(seconds[2] - seconds[1], 1e-3 * seconds[2]) / (many - few)
    return max(seconds[1] - few * token, 0.05 * seconds[1]) / len(experts), token


def on_card(weights: LayerWeights, cpu_call: CpuCall, last: bool) -> LayerOnCard | None:
    """What divides the calls of a loaded layer; None where prompts stay with the CPUs.

    The first layer measures what experts cost, and the last one says how they go to the card.

    Args:
        weights: the layer's.
        cpu_call: a call of it on tensors of the CPU.
        last: no other layer comes after it.

    Raises:
        UserError: the environment's threshold is no number.
    """
    least_tokens, found = threshold(), _card()
    held = np.array(weights.sources) >= 0
    if least_tokens is None or found is None or not held.any():
        return None
    device, dtype = found
    tables = None if weights.tables is None else torch.from_numpy(weights.tables).to(device)
    layer = packed_layer(weights.layer_idx, weights.layer.slices, held, tables)
    layout = weights.layout
    block_k = packed.METHODS[layout.method].block_k
    shape = ExpertShape(layout.num_experts, layout.hidden_size, layout.intermediate_size, block_k)
    card = card_experts(shape, layer.slot_bytes, device, dtype, weights.engine, os.getpid())
    card.forget(weights.layer_idx)  # before the new one is registered: there may be room for one
    registrations = registration(device, os.getpid())
    registered, staged = registrations.add(layer.slices, held, card.staging)
    layer = dataclasses.replace(layer, staged=staged, registered=registered)
    if device.type == "cuda":
        stream_context().pin_outputs(weights.engine)
    if not card.costs.measured:
        copy = measure_card(layer, card)
        expert, token = measure_cpu(cpu_call, layout.hidden_size, weights.top_k, held)
        card.costs = Costs(copy, expert, token, measured=True)
        logger.info(
            "kt_kernel: prompts of %d tokens or more use the card, too: an expert takes %.2f ms on "
            "the bus (%.1f GB/s%s), %.2f ms and %.4f ms for each token on the CPUs",
            least_tokens,
            1e3 * copy,
            layer.slot_bytes / copy / 1e9,
            " through staging buffers" if staged else "",
            1e3 * expert,
            1e3 * token,
        )
    if last:
        level = logging.WARNING if registrations.refusal else logging.INFO
        logger.log(level, "kt_kernel: %s", registrations.summary(card.staging))
    return LayerOnCard(card, layer, weights, least_tokens)
