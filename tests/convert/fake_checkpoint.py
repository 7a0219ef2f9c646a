"""Small checkpoints in DeepSeek V3's naming, whole or broken on purpose.

Tensors are kept as (safetensors dtype, shape, bytes) and written by a few lines here, so a test can
write what no library would: a wrong dtype, a shard that lacks a tensor, inf in the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

BLOCK = 128
INDEX = "model.safetensors.index.json"
Tensor = tuple[str, tuple[int, ...], bytes]


@dataclass
class FakeCheckpoint:
    """Fields to change before :meth:`write`; ``reference`` holds the exact weights as float32."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    reference: dict[str, np.ndarray]
    num_shards: int = 3
    index_changes: dict[str, str | None] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write config, shards and index; returns the directory."""
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(self.config, indent=1))
        names = list(self.tensors)
        weight_map: dict[str, str] = {}
        for number in range(self.num_shards):
            shard = f"model-{number + 1:05d}-of-{self.num_shards:05d}.safetensors"
            # Dealt out like cards, so that a layer and even a weight and its scale are apart.
            mine = {name: self.tensors[name] for name in names[number :: self.num_shards]}
            (path / shard).write_bytes(safetensors_bytes(mine))
            weight_map |= dict.fromkeys(mine, shard)
        for name, where in self.index_changes.items():
            if where is None:
                weight_map.pop(name, None)
            else:
                weight_map[name] = where
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
        return path


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file as the format's description has it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def encode(values: np.ndarray, dtype: str) -> tuple[dict[str, Tensor], np.ndarray]:
    """float32 [N, K] -> tensors by suffix of the weight's name, and what they mean exactly."""
    weight = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    shape = tuple(values.shape)
    if dtype != "fp8":
        kind, name = (torch.bfloat16, "BF16") if dtype == "bf16" else (torch.float16, "F16")
        stored = weight.to(kind)
        data = stored.view(torch.int16).numpy().tobytes()
        return {"": (name, shape, data)}, stored.to(torch.float32).numpy()
    rows, columns = shape
    scale = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), dtype=np.float32)
    for i, j in np.ndindex(*scale.shape):
        block = values[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        scale[i, j] = max(float(np.abs(block).max()), 1e-30) / 448.0
    spread = torch.from_numpy(
        scale.repeat(BLOCK, axis=0)[:rows].repeat(BLOCK, axis=1)[:, :columns].copy()
    )
    codes = (weight / spread).to(torch.float8_e4m3fn)
    tensors: dict[str, Tensor] = {
        "": ("F8_E4M3", shape, codes.view(torch.uint8).numpy().tobytes()),
        "_scale_inv": ("F32", scale.shape, scale.tobytes()),
    }
    return tensors, (codes.to(torch.float32) * spread).numpy()


def fake_checkpoint(
    dtype: str = "fp8",
    hidden_size: int = 128,
    intermediate_size: int = 64,
    num_experts: int = 3,
    num_layers: int = 4,
    first_dense: int = 1,
    seed: int = 0,
    values: Callable[[np.random.Generator, tuple[int, int]], np.ndarray] | None = None,
) -> FakeCheckpoint:
    """A checkpoint with dense layers, MoE layers, shared experts and an MTP layer."""
    rng = np.random.default_rng(seed)
    draw = values or (lambda gen, shape: gen.standard_normal(shape) * 0.02)
    h, i = hidden_size, intermediate_size
    config: dict[str, Any] = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "hidden_size": h,
        "moe_intermediate_size": i,
        "n_routed_experts": num_experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": first_dense,
        "moe_layer_freq": 1,
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": 1,
    }
    if dtype == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
        }
    tensors: dict[str, Tensor] = {}
    reference: dict[str, np.ndarray] = {}

    def add(name: str, shape: tuple[int, int]) -> None:
        parts, exact = encode(draw(rng, shape), dtype)
        tensors.update({name + suffix: tensor for suffix, tensor in parts.items()})
        reference[name] = exact

    def add_mlp(prefix: str) -> None:
        add(f"{prefix}.gate_proj.weight", (i, h))
        add(f"{prefix}.up_proj.weight", (i, h))
        add(f"{prefix}.down_proj.weight", (h, i))

    for layer in range(num_layers + 1):  # the last one is the MTP layer
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", (h,), bytes(2 * h))
        if layer < first_dense:
            add_mlp(f"model.layers.{layer}.mlp")
            continue
        for expert in range(num_experts):
            add_mlp(f"model.layers.{layer}.mlp.experts.{expert}")
        add_mlp(f"model.layers.{layer}.mlp.shared_experts")
    return FakeCheckpoint(config, tensors, reference)
