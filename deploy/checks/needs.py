"""What a model needs of a machine, from its own files; from V3.2's numbers while it has none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.source.checkpoint import INDEX_NAME, Checkpoint
from convert.source.config import (
    LARGEST_SIZE,
    MOST_EXPERTS,
    MOST_LAYERS,
    ModelConfig,
)
from convert.source.experts import parse_expert_name
from deploy.hub.marker import marker_or_none
from deploy.launch.gpu_memory import V32_CONFIG, GpuSizes
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import Fields, read_fields
from kt_kernel.files.safetensors_header import LARGEST_HEADER
from kt_kernel.gpu_prefill.memory import staging_bytes
from kt_kernel.packed import KT_METHODS, METHODS, PackedLayout

#: What has V3.2's sizes, before any of it is there.
V32_REPOSITORIES = ("deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V3.2-Speciale")
#: V3.2's bytes on the Hub.
V32_BYTES = 689e9
#: Of these, bytes that are loaded besides routed experts: neither those nor the MTP layer.
V32_RESIDENT_BYTES = 20e9

#: The server besides the model (measured with the tiny model, 3.5 GiB).
SERVER_BYTES = 4e9
#: Kernel buffers at 4096 tokens, top-8 and V3.2's width.
V32_SCRATCH_BYTES = 0.7e9
#: Bytes on the Hub. Below this, the machine does not matter: a laptop serves it.
LAPTOP_DOWNLOAD = 10e9


@dataclass(frozen=True)
class Needs:
    """Sizes of one model, in bytes.

    Attributes:
        known: taken from the model's own files and not V3.2's.
        download: of the whole repository's weights.
        packed: of all packed layer files, by name of the method.
        experts: routed experts of one layer.
        moe_layers: layers with routed experts.
        expert: one routed expert in the checkpoint.
        resident: weights besides routed experts.
        kv_per_token: of the KV cache.
        scratch_per_token: kernel buffers per token of a prefill chunk.
    """

    known: bool
    download: float
    packed: Mapping[str, float]
    experts: int
    moe_layers: int
    expert: float
    resident: float
    kv_per_token: float
    scratch_per_token: float

    @property
    def is_small(self) -> bool:
        """Whether the machine does not matter: a demo's model, or a test's."""
        return self.download < LAPTOP_DOWNLOAD

    @property
    def what(self) -> str:
        """Whose sizes these are, for people."""
        return "this model" if self.known else "V3.2 (the model is not there yet)"

    def weights(self, values: Mapping[str, Any]) -> float:
        """Packed weights of the method that these settings serve."""
        method, converted = values["KT_METHOD"], values["KT_QUANT_METHOD"]
        return self.packed[
            converted if METHODS[converted].kt_method == method else KT_METHODS[method]
        ]

    def memory(self, values: Mapping[str, Any]) -> float:
        """Main memory to serve with these settings."""
        share = 1 - min(values["KT_NUM_GPU_EXPERTS"], self.experts) / self.experts
        in_cpu_mode = values["KT_DEVICE"] == "cpu"
        needed: float = self.weights(values) * (1 if in_cpu_mode else share)
        needed += self.scratch_per_token * values["KT_CHUNKED_PREFILL_SIZE"] + SERVER_BYTES
        if not in_cpu_mode and values["KT_GPU_PREFILL_TOKEN_THRESHOLD"] is not None:
            needed += staging_bytes(values["KT_THREADPOOL_COUNT"])
        if in_cpu_mode:  # everything is here, and FP8 becomes bf16
            needed += 2 * self.resident + self.kv_per_token * (values["KT_MAX_TOTAL_TOKENS"] or 0)
        return needed


def model_needs(model_path: Path) -> Needs:
    """The needs of the model in a directory, as well as its files tell.

    Never fails: files that cannot be read are reported by the check of the model.
    """
    try:
        config = ModelConfig(model_path)
        dims = config.dims()
        packed = {
            method: len(dims.moe_layers())
            * float(
                sum(
                    spec.nbytes
                    for spec in PackedLayout(
                        dims.num_experts, dims.hidden_size, dims.intermediate_size, method
                    )
                    .tensors()
                    .values()
                )
            )
            for method in METHODS
        }
        return _needs(config.fields, packed, len(dims.moe_layers()), model_path)
    except UserError:
        pass
    layout = {m: PackedLayout(256, 7168, 2048, m).tensors().values() for m in METHODS}
    packed = {method: 58.0 * sum(spec.nbytes for spec in specs) for method, specs in layout.items()}
    return _needs(Fields(dict(V32_CONFIG), "V3.2"), packed, 58, None)


def _needs(
    config: Fields, packed: Mapping[str, float], moe_layers: int, path: Path | None
) -> Needs:
    expert = GpuSizes(config.values).expert
    experts = config.integer("n_routed_experts", 1, MOST_EXPERTS)
    top_k = config.integer("num_experts_per_tok", 1, experts)
    width = top_k * config.integer("hidden_size", 1, LARGEST_SIZE)
    kept = sum(
        config.integer(name, 0, LARGEST_SIZE) for name in ("kv_lora_rank", "qk_rope_head_dim")
    )
    download, resident = V32_BYTES, V32_RESIDENT_BYTES
    if path is not None:
        # MTP layers are downloaded, too, but not loaded.
        mtp_layers = config.integer("num_nextn_predict_layers", 0, MOST_LAYERS, 0)
        all_layers = moe_layers + mtp_layers
        download = _download_bytes(path, all_layers * experts * expert)
        resident = max(0.0, download - all_layers * experts * expert)
        resident = _resident_bytes(path, resident)
    return Needs(
        known=path is not None,
        download=download,
        packed=packed,
        experts=experts,
        moe_layers=moe_layers,
        expert=expert,
        resident=resident,
        kv_per_token=2 * config.integer("num_hidden_layers", 1, MOST_LAYERS) * kept,
        scratch_per_token=V32_SCRATCH_BYTES / 4096 * width / (8 * 7168),
    )


def _download_bytes(path: Path, otherwise: float) -> float:
    marker = marker_or_none(path)
    if marker is not None and marker.files:
        return marker.total_bytes
    try:
        index = read_fields(path / INDEX_NAME, LARGEST_HEADER)
        return index.inner("metadata", optional=True).number("total_size", otherwise)
    except UserError:  # not downloaded yet, or damaged
        return otherwise


def _resident_bytes(path: Path, otherwise: float) -> float:
    """Bytes of the tensors that are neither routed experts nor of an MTP layer."""
    try:
        with Checkpoint(path) as checkpoint:
            layers = checkpoint.dims.num_layers
            return float(
                sum(
                    checkpoint.nbytes(name)
                    for name in checkpoint.names
                    if parse_expert_name(name) is None and _layer_of(name) < layers
                )
            )
    except UserError:  # not downloaded to its end
        return otherwise


def _layer_of(name: str) -> int:
    match = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return int(match[1]) if match else -1
