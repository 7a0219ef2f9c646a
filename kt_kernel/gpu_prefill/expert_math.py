"""An expert on the card: packed bytes to matrices, and the pieces of SwiGLU around two products.

Each function has two forms, chosen by the device of its tensors: a Triton kernel on CUDA, and the
same in plain PyTorch, which defines it and which tests run on the CPU. docs/weight-format.md is the
source of the packed layout. The matrices hold the levels themselves, whole numbers in [-127, 127]
that bfloat16 holds exactly; the rows' scales are applied to the products in float32.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from types import ModuleType

#: Whether Triton runs its kernels on the CPU, step by step: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _kernels(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, where they compute this tensor; a machine without a card need not have
    Triton."""
    if not tensor.is_cuda and not _INTERPRETED:
        return None
    from kt_kernel.gpu_prefill import triton_kernels

    return triton_kernels


class SliceInSlot(NamedTuple):
    """Where the parts of one slice of an expert lie in a slot of the ring.

    ``begin`` and ``end`` are its rows of gate and up, and its columns of down. ``parts`` has, for
    gate, up and down, the byte offsets of codes, table index and scales from the slot's start.
    """

    begin: int
    end: int
    parts: tuple[tuple[int, int, int], ...]


class ExpertMatrices(NamedTuple):
    """One expert's weights as the products take them.

    ``gate_up`` [2I, H] and ``down`` [H, I] hold levels in the activations' dtype;
    ``gate_up_scale`` [2I] and ``down_scale`` [H] are float32: weight = level * scale of its row.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor


def unpack(
    slot: torch.Tensor,
    where: SliceInSlot,
    tables: torch.Tensor | None,
    block_k: int,
    to: ExpertMatrices,
) -> None:
    """Write one slice of an expert into its part of the matrices.

    Args:
        slot: uint8, the packed bytes.
        where: the slice's place in them.
        tables: int8 [256, 16] for int4, None for int8.
        block_k: k of a block that shares a table; 0 for int8.
        to: what is written.
    """
    if kernels := _kernels(slot):
        kernels.unpack(slot, where, tables, block_k, *to)
        return
    hidden, intermediate = to.down.shape
    rows = slice(where.begin, where.end)
    width = where.end - where.begin
    places = (
        (to.gate_up[rows], to.gate_up_scale[rows], width, hidden),
        (
            to.gate_up[intermediate:][rows],
            to.gate_up_scale[intermediate:][rows],
            width,
            hidden,
        ),
        (to.down[:, rows], to.down_scale, hidden, width),
    )
    for (matrix, scale, n, k), (codes_at, index_at, scales_at) in zip(
        places, where.parts, strict=True
    ):
        codes = slot[codes_at:]
        if tables is None:
            levels = codes[: n * k].view(torch.int8).view(n // 16, k // 4, 16, 4)
        else:
            pairs = codes[: n * k // 2].view(n // 16, k // 8, 1, 16, 4)
            nibbles = torch.cat((pairs & 15, pairs >> 4), dim=2).view(n // 16, k // 4, 16, 4)
            index = slot[index_at : index_at + n * k // (4 * block_k)]
            index = index.view(n // 16, k // block_k, 4).repeat_interleave(block_k // 4, dim=1)
            index = index.repeat_interleave(4, dim=2)[..., None]  # [panel, k-step, row, 1]
            levels = tables.flatten()[index.long() * 16 + nibbles]
        matrix.copy_(levels.transpose(1, 2).reshape(n, k))
        scale.copy_(slot[scales_at : scales_at + 2 * n].view(torch.bfloat16))


def swiglu(gate_up: torch.Tensor, scale: torch.Tensor, to: torch.Tensor) -> None:
    """silu(gate) * up of a product's rows, in float32.

    Args:
        gate_up: [T, 2I], the product before its scales.
        scale: float32 [2I].
        to: [T, I], written in its dtype.
    """
    if kernels := _kernels(gate_up):
        kernels.swiglu(gate_up, scale, to)
        return
    gate, up = (gate_up.float() * scale).chunk(2, dim=1)
    to.copy_(torch.nn.functional.silu(gate) * up)


def accumulate(
    product: torch.Tensor,
    scale: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    to: torch.Tensor,
) -> None:
    """Add an expert's rows to the tokens that chose it; each token is there once at most.

    Args:
        product: [T, H], before its scales.
        scale: float32 [H].
        tokens: int64 [T], rows of ``to``.
        weights: float32 [T], routing weights.
        to: float32 [tokens, H].
    """
    if kernels := _kernels(product):
        kernels.accumulate(product, scale, tokens, weights, to)
        return
    to.index_add_(0, tokens, product.float() * scale * weights[:, None])
