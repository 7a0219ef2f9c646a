"""The trained checkpoint: where it is, what its recipe says, and the model it holds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from examples.tiny.fp8 import dequantize_blocks
from examples.tiny.model import Mlp, Moe, TinyModel
from examples.tiny.tensors import EMBEDDING, HEAD, SCALE_SUFFIX

CHECKPOINT = Path(__file__).with_name("checkpoint")
RECIPE = Path(__file__).with_name("checkpoint.json")


def copy_checkpoint(output: Path) -> int:
    """Make ``output`` a copy of the checkpoint; returns its bytes."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(CHECKPOINT, output)
    return sum(file.stat().st_size for file in output.iterdir())


def recipe() -> dict[str, Any]:
    """Seed, steps, scores, facts and the SHA-256 of each of the checkpoint's files."""
    content: dict[str, Any] = json.loads(RECIPE.read_text("utf-8"))
    return content


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of ``folder``."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def published_tensors(model: TinyModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under a checkpoint's names, as views that can be read and written."""
    yield EMBEDDING, model.embedding.data
    yield "model.norm.weight", model.norm.weight.data
    yield HEAD, model.head.data
    for number, layer in enumerate(model.decoder_layers):
        prefix = f"model.layers.{number}"
        yield f"{prefix}.input_layernorm.weight", layer.attention_norm.weight.data
        yield f"{prefix}.post_attention_layernorm.weight", layer.mlp_norm.weight.data
        attention = layer.attention
        for name, parameter in (
            ("q_a_proj", attention.q_a),
            ("q_a_layernorm", attention.q_norm.weight),
            ("q_b_proj", attention.q_b),
            ("kv_a_proj_with_mqa", attention.kv_a),
            ("kv_a_layernorm", attention.kv_norm.weight),
            ("kv_b_proj", attention.kv_b),
            ("o_proj", attention.o),
        ):
            yield f"{prefix}.self_attn.{name}.weight", parameter.data
        mlp = layer.mlp
        if isinstance(mlp, Mlp):
            yield from _mlp(f"{prefix}.mlp", mlp.gate_up.data, mlp.down.data)
        if isinstance(mlp, Moe):
            yield f"{prefix}.mlp.gate.weight", mlp.gate.data
            yield f"{prefix}.mlp.gate.e_score_correction_bias", mlp.bias
            shared = mlp.shared
            yield from _mlp(f"{prefix}.mlp.shared_experts", shared.gate_up.data, shared.down.data)
            for expert in range(len(mlp.gate)):
                name = f"{prefix}.mlp.experts.{expert}"
                yield from _mlp(name, mlp.gate_up.data[expert], mlp.down.data[expert])


def _mlp(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", down


def load(folder: Path, model: TinyModel) -> TinyModel:
    """Fill ``model`` with what the checkpoint in ``folder`` stands for."""
    stored: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= load_file(shard)
    for name, value in published_tensors(model):
        scale = stored.get(name + SCALE_SUFFIX)
        tensor = stored[name]
        value.copy_(tensor.float() if scale is None else dequantize_blocks(tensor, scale))
    return model.eval()
