"""The trained checkpoint at sizes that SGLang's GPU kernels take, computing the same.

What a GPU holds of an FP8 matrix that is divided among GPUs has a multiple of 128 rows or columns,
and the Triton decode takes latents of 512 + 64 or 256 + 32 values. So experts, latents and heads
get more values, all zero, enough for two GPUs; the norm over the latent, whose mean square is then
smaller, gets smaller weights.
"""

from __future__ import annotations

import dataclasses
import json
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.tiny.config import BLOCK, model_config
from examples.tiny.tensors import SCALE_SUFFIX
from examples.tiny.train import SIZES
from examples.tiny.trained import copy_checkpoint

PADDED = dataclasses.replace(
    SIZES, moe_intermediate_size=256, kv_lora_rank=256, num_attention_heads=8
)
HEADS = PADDED.num_attention_heads // SIZES.num_attention_heads
"""Factor on the number of heads; the trained ones come first."""


def write_padded(output: Path) -> None:
    """Write the checkpoint into ``output``."""
    copy_checkpoint(output)
    for shard in output.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name + SCALE_SUFFIX in tensors]:
            weight, scale = tensors[name], tensors[name + SCALE_SUFFIX]
            tensors[name], tensors[name + SCALE_SUFFIX] = padded(name, weight, scale)
        for name in tensors:
            if name.endswith("kv_a_layernorm.weight"):
                share = SIZES.kv_lora_rank / PADDED.kv_lora_rank
                weight = torch.ones(PADDED.kv_lora_rank, dtype=tensors[name].dtype)
                weight[: SIZES.kv_lora_rank] = tensors[name] * sqrt(share)
                tensors[name] = weight
        save_file(tensors, shard, metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(model_config(PADDED, "fp8"), indent=2))


def padded(name: str, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A weight, e4m3 [N, K], with its blocks' scales; zeros where the padded model has more."""
    rows, columns = weight.shape
    place = torch.arange(rows)  # of each row among the new ones
    projection = name.removesuffix(".weight").rpartition(".")[2]
    if ".experts." in name or ".shared_experts." in name:
        more = PADDED.moe_intermediate_size - SIZES.moe_intermediate_size
        rows += more * (projection != "down_proj")
        columns += more * (projection == "down_proj")
    elif projection == "q_b_proj":
        rows *= HEADS
    elif projection == "kv_b_proj":
        rows *= HEADS
        columns = PADDED.kv_lora_rank
    elif projection == "o_proj":
        columns *= HEADS
    elif projection == "kv_a_proj_with_mqa":  # the latent, then what carries positions
        more = PADDED.kv_lora_rank - SIZES.kv_lora_rank
        place[SIZES.kv_lora_rank :] += more
        rows += more
    bits = torch.zeros(rows, columns, dtype=torch.uint8)
    bits[place, : weight.shape[1]] = weight.view(torch.uint8)
    scales = torch.ones(-(-rows // BLOCK), -(-columns // BLOCK))
    old_block = torch.arange(len(weight)) // BLOCK
    scales[place // BLOCK, : scale.shape[1]] = scale[old_block]
    return bits.view(weight.dtype), scales
