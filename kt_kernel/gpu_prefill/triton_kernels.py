"""The Triton kernels behind ``expert_math``, which says what each one computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from kt_kernel.gpu_prefill.expert_math import SliceInSlot

_PANEL_ROWS = 16
_COLUMNS = 1024  # of a row that one program of swiglu and accumulate takes


@triton.jit
def _unpack_kernel(
    slot,
    tables,
    gate_up,
    down,
    gate_up_scale,
    down_scale,
    hidden,
    intermediate,
    begin,
    width,
    gate_codes,
    gate_index,
    gate_scales,
    up_codes,
    up_index,
    up_scales,
    down_codes,
    down_index,
    down_scales,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
):
    # A program writes 16 rows by TILE_K columns; the three projections have as many tiles each.
    tiles = (width // 16) * (hidden // TILE_K)
    program = tl.program_id(0)
    projection = program // tiles
    is_down = projection == 2
    is_up = projection == 1
    k_extent = tl.where(is_down, width, hidden)
    tile = program % tiles
    panel = tile // (k_extent // TILE_K)
    first_k = tile % (k_extent // TILE_K) * TILE_K
    codes_at = tl.where(is_down, down_codes, tl.where(is_up, up_codes, gate_codes))
    index_at = tl.where(is_down, down_index, tl.where(is_up, up_index, gate_index))
    scales_at = tl.where(is_down, down_scales, tl.where(is_up, up_scales, gate_scales))

    row = tl.arange(0, 16)
    k = first_k + tl.arange(0, TILE_K)
    r = row[:, None]
    c = k[None, :]
    if BLOCK_K == 0:
        codes = slot + codes_at + panel.to(tl.int64) * k_extent * 16
        levels = tl.load(codes + c // 4 * 64 + 4 * r + c % 4).to(tl.int8, bitcast=True)
    else:
        codes = slot + codes_at + panel.to(tl.int64) * k_extent * 8
        pair = tl.load(codes + c // 8 * 64 + 4 * r + c % 4).to(tl.int32)
        nibble = (pair >> (c % 8 // 4 * 4)) & 15
        index = slot + index_at + panel.to(tl.int64) * (k_extent // BLOCK_K) * 4
        table = tl.load(index + c // BLOCK_K * 4 + r // 4).to(tl.int32)
        levels = tl.load(tables + table * 16 + nibble)
    scale = tl.load((slot + scales_at).to(tl.pointer_type(tl.bfloat16)) + panel * 16 + row)
    values = levels.to(tl.float32).to(gate_up.dtype.element_ty)
    if is_down:
        out_row = (panel * 16 + row).to(tl.int64)
        tl.store(down + out_row[:, None] * intermediate + begin + c, values)
        if first_k == 0:
            tl.store(down_scale + out_row, scale.to(tl.float32))
    else:
        out_row = (projection * intermediate + begin + panel * 16 + row).to(tl.int64)
        tl.store(gate_up + out_row[:, None] * hidden + c, values)
        if first_k == 0:
            tl.store(gate_up_scale + out_row, scale.to(tl.float32))


def unpack(
    slot: torch.Tensor,
    where: SliceInSlot,
    tables: torch.Tensor | None,
    block_k: int,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_scale: torch.Tensor,
) -> None:
    hidden, intermediate = down.shape
    width = where.end - where.begin
    tile_k = 256
    while hidden % tile_k or width % tile_k:
        tile_k //= 2
    tiles = (width // _PANEL_ROWS) * (hidden // tile_k)
    _unpack_kernel[(3 * tiles,)](
        slot,
        slot if tables is None else tables,
        gate_up,
        down,
        gate_up_scale,
        down_scale,
        hidden,
        intermediate,
        where.begin,
        width,
        *(offset for part in where.parts for offset in part),
        BLOCK_K=block_k,
        TILE_K=tile_k,
    )


@triton.jit
def _swiglu_kernel(gate_up, scale, to, intermediate, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < intermediate
    source = gate_up + row * 2 * intermediate + column
    gate = tl.load(source, inside, 0.0).to(tl.float32) * tl.load(scale + column, inside, 0.0)
    up = tl.load(source + intermediate, inside, 0.0).to(tl.float32)
    up *= tl.load(scale + intermediate + column, inside, 0.0)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(to + row * intermediate + column, value.to(to.dtype.element_ty), inside)


def swiglu(gate_up: torch.Tensor, scale: torch.Tensor, to: torch.Tensor) -> None:
    rows, intermediate = to.shape
    grid = rows, triton.cdiv(intermediate, _COLUMNS)
    _swiglu_kernel[grid](gate_up, scale, to, intermediate, COLUMNS=_COLUMNS)


@triton.jit
def _accumulate_kernel(product, scale, tokens, weights, to, hidden, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    value = tl.load(product + row * hidden + column, inside, 0.0).to(tl.float32)
    value *= tl.load(scale + column, inside, 0.0) * tl.load(weights + row)
    place = to + tl.load(tokens + row) * hidden + column
    tl.store(place, tl.load(place, inside, 0.0) + value, inside)


def accumulate(
    product: torch.Tensor,
    scale: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    to: torch.Tensor,
) -> None:
    rows, hidden = product.shape
    grid = rows, triton.cdiv(hidden, _COLUMNS)
    _accumulate_kernel[grid](product, scale, tokens, weights, to, hidden, COLUMNS=_COLUMNS)
