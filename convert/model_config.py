"""The dimensions that conversion needs from a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
        hidden_size: model width H.
        intermediate_size: width I of one routed expert.
        fp8_block: ``weight_block_size`` (rows, columns) of the FP8 scales; None if there is none.
    """

    model_type: str
    num_layers: int
    first_dense: int
    moe_layer_freq: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    fp8_block: tuple[int, ...] | None

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether the decoder layer has routed experts (an MTP layer does not count)."""
        return (
            self.first_dense <= layer_idx < self.num_layers and layer_idx % self.moe_layer_freq == 0
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
                f"DeepSeek V3 family"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise UserError(f"{path}: {name} is {value!r}, expected an integer >= {minimum}")
        return value

    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    dims = ModelDims(
        model_type=str(config.get("model_type", "unknown")),
        num_layers=integer("num_hidden_layers", 1),
        first_dense=integer("first_k_dense_replace", 0, 0),
        moe_layer_freq=integer("moe_layer_freq", 1, 1),
        num_experts=integer("n_routed_experts", 1),
        hidden_size=integer("hidden_size", 1),
        intermediate_size=integer("moe_intermediate_size", 1),
        fp8_block=tuple(block) if isinstance(block, list) else None,
    )
    if not dims.moe_layers():
        raise UserError(
            f"{path} describes no layer with experts: first_k_dense_replace is {dims.first_dense}, "
            f"moe_layer_freq {dims.moe_layer_freq}, num_hidden_layers {dims.num_layers}"
        )
    return dims
