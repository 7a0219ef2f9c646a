"""Whether a loaded layer computes what its file says, on this CPU and from this memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from kt_kernel import packed
from kt_kernel.calls import Batch, current_stream
from kt_kernel.errors import UserError
from kt_kernel.layer_weights import PLAIN_TARGET
from kt_kernel.wrapper import KTMoEWrapper

logger = logging.getLogger(__name__)

#: Tokens of the batch that runs as decode does, and of the one that is large enough for an expert
#: to run through matrix tiles; experts of the latter, few because the plain kernel is slow.
FEW_TOKENS, MANY_TOKENS = 2, 16
EXPERTS_OF_MANY = 2
#: Of the card's part of a prompt, whose activations are not int8: mean |difference| / |output|.
CARD_DIFFERENCE = 0.1


def check_layer(
    wrapper: KTMoEWrapper, device: str | torch.device = "cpu", graphs: bool = False
) -> None:
    """Push known batches through the layer; compare with the plain kernel on the file's weights.

    Twice top-k of the CPU's experts, spread over all, are read from the file again. In these, it
    finds a kernel, a CPU or a data path that is wrong, and memory that does not hold what the
    file says.

    Args:
        wrapper: with a file's weights loaded.
        device: where the batches come from, as SGLang's do.
        graphs: on a GPU, replay each call from a CUDA graph as well.

    Raises:
        UserError: one bit of the outputs differs.
    """
    started = time.monotonic()
    slots = wrapper.cpu_slots()
    count = min(FEW_TOKENS * wrapper.top_k, len(slots))
    if count == 0:
        return  # all experts are on the GPU
    chosen = [slots[i * len(slots) // count] for i in range(count)]
    exact, plain = wrapper.without_deferral(), wrapper.plain_copy(chosen)
    for tokens in (FEW_TOKENS, MANY_TOKENS):
        x, ids, weights = _batch(wrapper, chosen, tokens)
        on_device = x.to(device), ids.to(device), weights.to(device)
        outputs = [exact.forward(*on_device, current_stream(on_device[0])).cpu()]
        if graphs and on_device[0].is_cuda:
            outputs.append(_replayed(exact, *on_device))
        want = plain.forward(x, ids, weights)
        for found, how in zip(outputs, ("", " in a CUDA graph"), strict=False):
            unequal = int((found != want).sum())  # NaN, too
            if unequal:
                error = float((found - want).abs().mean() / want.abs().mean())
                raise UserError(
                    f"self-test of layer {wrapper.layer_idx}: {unequal} of {want.numel()} outputs "
                    f"for {tokens} tokens{how} differ, by {100 * error:.2g}% on average, from "
                    f"those of the weights in {packed.layer_file_name(wrapper.layer_idx)}: "
                    "expected the same bits; start again, test the memory, and try "
                    f"KT_TARGET={PLAIN_TARGET}, which is slow"
                )
    logger.info(
        "kt_kernel: self-test of layer %d: %d experts give the bits of target %s%s, %.1f s",
        wrapper.layer_idx,
        count,
        plain.target,
        ", in CUDA graphs too" if len(outputs) > 1 else "",
        time.monotonic() - started,
    )


def check_card(wrapper: KTMoEWrapper) -> None:
    """Push a batch through the card's part of a prompt; compare with the CPUs' kernels.

    The two differ by what int8 activations cost, so this finds wrong places and wrong memory. It
    also compiles the card's kernels, for which the first prompt would wait.

    Raises:
        UserError: the outputs have little to do with each other, or the card does not compute them.
    """
    on_card, slots = wrapper.on_card, wrapper.cpu_slots()
    if on_card is None or not slots:
        return
    started = time.monotonic()
    x, ids, weights = _batch(wrapper, slots, MANY_TOKENS)
    x = x.to(on_card.card.dtype)
    device = on_card.card.device
    try:
        batch = Batch(x.to(device), ids.to(device), weights.to(device))
        found = on_card.all_on_card(batch, ids).cpu().float()
    except Exception as error:
        raise UserError(
            f"self-test of layer {wrapper.layer_idx}: the card's part of a prompt fails: "
            f"{type(error).__name__}: {error}; set KT_GPU_PREFILL_TOKEN_THRESHOLD=none"
        ) from error
    want = wrapper.without_deferral().forward(x, ids, weights).float()
    difference = float((found - want).abs().mean() / want.abs().mean())
    if not difference < CARD_DIFFERENCE:  # NaN, too
        raise UserError(
            f"self-test of layer {wrapper.layer_idx}: the card's part of a prompt differs by "
            f"{100 * difference:.0f}% from the CPUs': expected less than "
            f"{100 * CARD_DIFFERENCE:.0f}%; test the card, or set "
            "KT_GPU_PREFILL_TOKEN_THRESHOLD=none"
        )
    logger.info(
        "kt_kernel: self-test of layer %d: the card's part of a prompt differs by %.2g%% from the "
        "CPUs', %.1f s",
        wrapper.layer_idx,
        100 * difference,
        time.monotonic() - started,
    )


def _replayed(
    wrapper: KTMoEWrapper, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The output of a call that a CUDA graph has captured and replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = wrapper.forward(x, ids, weights)
    graph.replay()
    return captured.cpu()


def _batch(
    wrapper: KTMoEWrapper, chosen: list[int], tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x fp32 [T, H], ids int32 [T, k] and weights fp32 [T, k].

    Few tokens take the chosen experts in turn; many take the same ones, so that each has many.
    """
    # "cpu" is said everywhere: SGLang may have made the GPU the default device.
    generator = torch.Generator("cpu").manual_seed(wrapper.layer_idx)

    def drawn(kind: Callable[..., torch.Tensor], *shape: int) -> torch.Tensor:
        return kind(*shape, dtype=torch.float32, generator=generator, device="cpu")

    x = drawn(torch.randn, tokens, wrapper.hidden_size)
    x[:, 1] *= 50  # a channel that stands out, as a few of a large model do
    ids = torch.full((tokens, wrapper.top_k), -1, dtype=torch.int32, device="cpu")
    for token in range(tokens):
        if tokens == FEW_TOKENS:
            mine = chosen[token * wrapper.top_k :][: wrapper.top_k]
        else:
            mine = chosen[:EXPERTS_OF_MANY][: wrapper.top_k]
        ids[token, : len(mine)] = torch.tensor(mine, dtype=torch.int32, device="cpu")
    return x, ids, drawn(torch.rand, tokens, wrapper.top_k)
