"""Load a block-quantised FP8 checkpoint into unquantised layers."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin.cpu_mode.config import BLOCK_SIZE_ATTRIBUTE

SCALE_SUFFIX = "_scale_inv"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def load_dequantized(
    model: Any, weights: NamedTensors, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before ``DeepseekV2ForCausalLM.load_weights``: filter and dequantise ``weights``.

    Tensors nobody uses (CPU experts, the indexer, the MTP layer) are dropped here.
    SGLang reads shards by memory map, so what is dropped is never read from disk.
    """
    wanted = needed_weights(weights, model.config.num_hidden_layers, resident_experts(model))
    block_size = getattr(model.config, BLOCK_SIZE_ATTRIBUTE, (128, 128))
    run_dtype = next(model.parameters()).dtype
    return (model, dequantized(wanted, block_size, run_dtype), *args), kwargs


def resident_experts(model: torch.nn.Module) -> dict[int, list[int]]:
    """The checkpoint's experts that SGLang itself runs, of each layer with CPU experts."""
    from sglang.srt.eplb.expert_location_dispatch import get_global_expert_location_metadata
    from sglang.srt.layers.moe.kt_ep_wrapper import KTEPWrapperMethod

    methods = (getattr(module, "quant_method", None) for module in model.modules())
    through_kt = [method for method in methods if isinstance(method, KTEPWrapperMethod)]
    if not through_kt:
        return {}
    locations = get_global_expert_location_metadata().physical_to_logical_map_cpu
    layers = {method.kt_config.layer_idx: method.num_gpu_experts for method in through_kt}
    return {layer: locations[layer, :count].tolist() for layer, count in layers.items()}


def needed_weights(
    weights: NamedTensors, num_hidden_layers: int, resident: Mapping[int, Collection[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights a dense-attention model without MTP and CPU experts has.

    Layers of which ``resident`` says nothing have no CPU experts.
    """
    for name, tensor in weights:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= num_hidden_layers:
            continue
        if ".self_attn.indexer." in name:
            continue
        expert = _EXPERT.match(name)
        kept = resident.get(int(expert[1])) if expert else None
        if expert and kept is not None and int(expert[2]) not in kept:
            continue
        yield name, tensor


def dequantized(
    weights: NamedTensors, block_size: tuple[int, int], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pair every FP8 ``X.weight`` with ``X.weight_scale_inv``; yield the product as ``dtype``.

    The two may come in either order and from different shards. Other tensors pass
    through. Raises :class:`UserError` for a pair that is incomplete or does not fit.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        is_scale = name.endswith(SCALE_SUFFIX)
        if not is_scale and tensor.dtype != torch.float8_e4m3fn:
            yield name, tensor
            continue
        weight_name = name.removesuffix(SCALE_SUFFIX)
        partner = waiting.pop(weight_name, None)
        if partner is None:
            waiting[weight_name] = tensor
            continue
        weight, scale = (partner, tensor) if is_scale else (tensor, partner)
        yield weight_name, dequantize_blocks(weight_name, weight, scale, block_size, dtype)
    if waiting:
        name, tensor = next(iter(waiting.items()))
        lacking = SCALE_SUFFIX if tensor.dtype == torch.float8_e4m3fn else ""
        raise UserError(
            f"the checkpoint has no tensor {name}{lacking} "
            f"({len(waiting)} FP8 weights without scale or scales without weight); "
            "download the model again"
        )


def dequantize_blocks(
    name: str,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``weight`` [N, K] float8_e4m3fn times its block's ``scale_inv`` [ceil(N/bn), ceil(K/bk)].

    One row of blocks at a time, so that the float32 product stays small.
    """
    block_rows, block_columns = block_size
    rows, columns = weight.shape
    expected = (-(-rows // block_rows), -(-columns // block_columns))
    if tuple(scale_inv.shape) != expected:
        raise UserError(
            f"{name}{SCALE_SUFFIX} has shape {tuple(scale_inv.shape)}; "
            f"expected {expected} for a weight of shape {(rows, columns)} "
            f"in blocks of {block_rows} x {block_columns}"
        )
    result = torch.empty(rows, columns, dtype=dtype)
    for block_row, scales in enumerate(scale_inv.float()):
        span = slice(block_row * block_rows, (block_row + 1) * block_rows)
        per_column = scales.repeat_interleave(block_columns)[:columns]
        result[span] = (weight[span].float() * per_column).to(dtype)
    return result
