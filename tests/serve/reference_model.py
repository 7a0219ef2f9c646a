"""The checkpoint in transformers, float32, with kt_kernel's packed weights for its CPU experts.

The experts that SGLang keeps resident use the checkpoint's own weights, all others
what their packed INT4 or INT8 weights stand for. So a served token can only differ
through how activations are quantised, or through an error.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kt_kernel import _ext, packed

PROJECTIONS = ("gate", "up", "down")
FP8_BLOCK = 128


def load(
    checkpoint: Path, weights: Path | None, resident: int | Mapping[int, Sequence[int]]
) -> PreTrainedModel:
    """Build the model that the server stands for with so many GPU experts a layer.

    Or with these ones, by layer. Without packed ``weights`` every expert has to be resident: the
    checkpoint's own model.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    # The tensors are dequantised here; transformers must not do it again.
    del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )

    tensors = read_dequantized(checkpoint)
    state = {
        name: tensor
        for name, tensor in tensors.items()
        if ".mlp.experts." not in name and _layer_of(name) < config.num_hidden_layers
    }
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        residents = range(resident) if isinstance(resident, int) else resident[layer]
        if weights is None:
            unpacked = {
                projection: torch.zeros(
                    len(residents), *tensors[f"{prefix}.0.{projection}_proj.weight"].shape
                )
                for projection in PROJECTIONS
            }
        else:
            unpacked = read_packed(weights / packed.layer_file_name(layer))
        for expert in residents:
            for projection in PROJECTIONS:
                unpacked[projection][expert] = tensors[
                    f"{prefix}.{expert}.{projection}_proj.weight"
                ]
        state[f"{prefix}.gate_up_proj"] = torch.cat([unpacked["gate"], unpacked["up"]], dim=1)
        state[f"{prefix}.down_proj"] = unpacked["down"]
    model.load_state_dict(state)
    return model.eval()


def read_dequantized(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors as float32, FP8 weights multiplied by their blocks' scales."""
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    result = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.float()
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            grid = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            value = value * grid[: value.shape[0], : value.shape[1]]
        result[name] = value
    return result


def read_packed(path: Path) -> dict[str, torch.Tensor]:
    """The weights a packed layer stands for: {projection: float32 [E, N, K]}."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: as_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    method = metadata["method"]
    has_tables = packed.METHODS[method].block_k
    hidden, intermediate = int(metadata["hidden_size"]), int(metadata["intermediate_size"])
    result = {}
    for projection in PROJECTIONS:
        rows, columns = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
        result[projection] = torch.from_numpy(
            np.stack(
                [
                    _ext.dequantize_projection(
                        tensors[f"{projection}.codes"][expert].view(np.uint8),
                        tensors[f"{projection}.scales"][expert],
                        tensors[f"{projection}.table_index"][expert] if has_tables else None,
                        tensors["tables"] if has_tables else None,
                        rows,
                        columns,
                        method,
                    )
                    for expert in range(int(metadata["num_experts"]))
                ]
            )
        )
    return result


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor, bf16 as the bits that ``dequantize_projection`` takes."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@torch.no_grad()
def most_likely(model: PreTrainedModel, input_ids: list[int], answer: list[int]) -> list[int]:
    """For each token of ``answer``, the most likely one after all that stands before it."""
    logits: torch.Tensor = model(torch.tensor([input_ids + answer[:-1]])).logits
    return logits[0, len(input_ids) - 1 :].argmax(-1).tolist()


@torch.no_grad()
def routed(model: PreTrainedModel, input_ids: list[int]) -> dict[int, torch.Tensor]:
    """The experts [T, k] to which the tokens go, by layer."""
    found: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, arguments, index=index: found.update({index: arguments[1]})
        )
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    model(torch.tensor([input_ids]))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, input_ids: list[int]) -> torch.Tensor:
    """float32 [T, vocabulary]: row t is the distribution of token t + 1."""
    logits: torch.Tensor = model(torch.tensor([input_ids])).logits
    return logits[0].float().log_softmax(-1)


def _layer_of(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
