"""The dimensions that conversion needs from a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_kernel.errors import UserError

#: DeepSeek V3's FP8 scheme and the only one the extension dequantises: one scale per 128 x 128.
FP8_BLOCK = (128, 128)


@dataclass(frozen=True)
class ModelDims:
    """What ``config.json`` says about the routed experts.

    Attributes:
        model_type: ``model_type`` of the config, for people and for error messages.
        num_layers: decoder layers; a layer with this index or a larger one is an MTP layer.
        first_dense: the first so many layers have a dense MLP and no experts.
        moe_layer_freq: of the others, every so manieth has experts.
        num_experts: routed experts per MoE layer.
        experts_key: name of that number in the config.
        hidden_size: model width H.
        intermediate_size: width I of one routed expert.
        fp8_block: ``weight_block_size`` (rows, columns) of the FP8 scales; None if there is none.
        int4_scheme: what compressed-tensors' config says of the weights, with its format; empty
            if there is none.
        dense_layers: layers with a dense MLP besides (Qwen's ``mlp_only_layers``).
        counted_from: 0 if layer 0 is the first of the ``moe_layer_freq``, 1 if the one before it.
    """

    model_type: str
    num_layers: int
    first_dense: int
    moe_layer_freq: int
    num_experts: int
    experts_key: str
    hidden_size: int
    intermediate_size: int
    fp8_block: tuple[int, ...] | None
    int4_scheme: dict[str, Any] = field(default_factory=dict)
    dense_layers: frozenset[int] = frozenset()
    counted_from: int = 0

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether the decoder layer has routed experts (an MTP layer does not count)."""
        return (
            self.first_dense <= layer_idx < self.num_layers
            and (layer_idx + self.counted_from) % self.moe_layer_freq == 0
            and layer_idx not in self.dense_layers
        )

    def moe_layers(self) -> list[int]:
        """Indices of the layers to convert, ascending."""
        return [idx for idx in range(self.num_layers) if self.is_moe_layer(idx)]


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_model_dims(path: Path) -> ModelDims:
    """Read ``config.json``.

    Raises:
        UserError: a field is missing or has a value this program cannot work with; the message
            names the file and the field.
    """
    config = read_json(path)

    def integer(name: str, minimum: int, default: int | None = None) -> int:
        value = config.get(name, default)
        if value is None:
            raise UserError(
                f"{path} has no {name}: expected the config of a mixture-of-experts model of the "
                f"DeepSeek V3, Kimi K2, GLM-4.5 or Qwen3-MoE family"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise UserError(f"{path}: {name} is {value!r}, expected an integer >= {minimum}")
        return value

    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    # Qwen has its own names for the same things; DeepSeek's, Kimi's and GLM's are alike.
    qwen = "n_routed_experts" not in config and "num_experts" in config
    experts_key = "num_experts" if qwen else "n_routed_experts"
    frequency_key = "decoder_sparse_step" if qwen else "moe_layer_freq"
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(idx, int) for idx in dense):
        raise UserError(f"{path}: mlp_only_layers is {dense!r}, expected a list of integers")
    dims = ModelDims(
        model_type=str(config.get("model_type", "unknown")),
        num_layers=integer("num_hidden_layers", 1),
        first_dense=integer("first_k_dense_replace", 0, 0),
        moe_layer_freq=integer(frequency_key, 1, 1),
        num_experts=integer(experts_key, 1),
        experts_key=experts_key,
        hidden_size=integer("hidden_size", 1),
        intermediate_size=integer("moe_intermediate_size", 1),
        fp8_block=tuple(block) if isinstance(block, list) else None,
        int4_scheme=_int4_scheme(quantization),
        dense_layers=frozenset(dense),
        counted_from=1 if qwen else 0,
    )
    if not dims.moe_layers():
        raise UserError(
            f"{path} describes no layer with experts: first_k_dense_replace is {dims.first_dense}, "
            f"{frequency_key} {dims.moe_layer_freq}, num_hidden_layers {dims.num_layers}"
        )
    return dims


def _int4_scheme(quantization: object) -> dict[str, Any]:
    """The ``weights`` of compressed-tensors' only group with its ``format``; empty if not that."""
    if not isinstance(quantization, dict):
        return {}
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return {}
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    # The format stands in the group in newer files, and beside the groups in all.
    found = (group.get("format") or quantization.get("format")) if weights else None
    return {**weights, "format": found} if isinstance(weights, dict) else {}
