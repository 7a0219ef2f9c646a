"""A checkpoint's ``config.json``, and the dimensions that conversion needs of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_kernel.errors import UserError
from kt_kernel.files.foreign import Fields, read_fields

CONFIG_NAME = "config.json"
#: Sizes that no model comes near: a config beyond is damaged, and would take memory and time.
MOST_LAYERS, MOST_EXPERTS, LARGEST_SIZE = 10_000, 65_536, 1 << 24


@dataclass(frozen=True)
class ModelDims:
    """What ``config.json`` says about the routed experts.

    Attributes:
        model_type: ``model_type`` of the config, for people and for error messages.
        num_layers: decoder layers; a layer with this index or a larger one is an MTP layer.
        first_dense: the first so many layers have a dense MLP and no experts.
        moe_layer_freq: of the others, one in so many has experts.
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


class ModelConfig:
    """A checkpoint's ``config.json``; as in the libraries that write it, null is no field.

    Args:
        folder: the checkpoint's.

    Raises:
        FileMissing: there is none.
        UserError: it is no JSON object, or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG_NAME
        self.fields = read_fields(self.path, advice="download it again")

    def dims(self) -> ModelDims:
        """What it says about the routed experts.

        Raises:
            UserError: a field is missing or has a value this program cannot work with; the message
                names the file and the field.
        """
        config, path = self.fields, self.path

        def integer(name: str, minimum: int, maximum: int, default: int | None = None) -> int:
            if default is None and not config.has(name):
                raise UserError(
                    f"{path} has no {name}: expected the config of a mixture-of-experts model of "
                    f"the DeepSeek V3, Kimi K2, GLM-4.5 or Qwen3-MoE family"
                )
            return config.integer(name, minimum, maximum, default)

        # Quantised or not, the conversion reads the weights; of a scheme it knows it needs more.
        quantization = config.inner("quantization_config", optional=True)
        block = quantization.integers("weight_block_size", default=[])
        # Qwen has its own names for the same things; DeepSeek's, Kimi's and GLM's are alike.
        qwen = not config.has("n_routed_experts") and config.has("num_experts")
        experts_key = "num_experts" if qwen else "n_routed_experts"
        frequency_key = "decoder_sparse_step" if qwen else "moe_layer_freq"
        found = ModelDims(
            model_type=config.text("model_type", "unknown"),
            num_layers=integer("num_hidden_layers", 1, MOST_LAYERS),
            first_dense=integer("first_k_dense_replace", 0, MOST_LAYERS, 0),
            moe_layer_freq=integer(frequency_key, 1, MOST_LAYERS, 1),
            num_experts=integer(experts_key, 1, MOST_EXPERTS),
            experts_key=experts_key,
            hidden_size=integer("hidden_size", 1, LARGEST_SIZE),
            intermediate_size=integer("moe_intermediate_size", 1, LARGEST_SIZE),
            fp8_block=tuple(block) if block else None,
            int4_scheme=_int4_scheme(quantization),
            dense_layers=frozenset(config.integers("mlp_only_layers", MOST_LAYERS, [])),
            counted_from=1 if qwen else 0,
        )
        if not found.moe_layers():
            raise UserError(
                f"{path} describes no layer with experts: first_k_dense_replace is "
                f"{found.first_dense}, {frequency_key} {found.moe_layer_freq}, num_hidden_layers "
                f"{found.num_layers}"
            )
        return found


def _int4_scheme(quantization: Fields) -> dict[str, Any]:
    """The ``weights`` of compressed-tensors' only group with its ``format``; empty if not that."""
    groups = quantization.inner("config_groups", optional=True)
    names = [name for name in groups.values if groups.has(name)]
    if len(names) != 1:
        return {}
    group = groups.inner(names[0])
    weights = group.inner("weights", optional=True)
    # The format stands in the group in newer files, and beside the groups in all.
    found = group if group.has("format") else quantization
    return {**weights.values, "format": found.text("format", "")} if weights.values else {}
