"""V3.2's sizes, with any number of its MoE layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from deploy.launch.gpu_memory import V32_CONFIG
from examples.tiny.config import TinySizes, model_config

#: Routed experts' layers of the whole model.
MOE_LAYERS = V32_CONFIG["num_hidden_layers"] - V32_CONFIG["first_k_dense_replace"]


def with_moe_layers(count: int) -> TinySizes:
    """The model cut off after its first ``count`` MoE layers, without the MTP layer."""
    known = {field.name for field in dataclasses.fields(TinySizes)}
    sizes = {name: value for name, value in V32_CONFIG.items() if name in known}
    sizes |= {
        "num_hidden_layers": V32_CONFIG["first_k_dense_replace"] + count,
        "num_nextn_predict_layers": 0,
        "n_group": 8,
        "topk_group": 4,
    }
    return TinySizes(**sizes)


def config_of(count: int) -> dict[str, Any]:
    """``config.json`` of that model."""
    return model_config(with_moe_layers(count), "fp8")
