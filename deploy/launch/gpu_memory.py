"""What serving takes of each GPU's memory, from the sizes in the model's ``config.json`` alone.

docs/gpu-memory.md has the formulas with their sources, and the numbers for V3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.source.config import MOST_EXPERTS, MOST_LAYERS, ModelConfig
from kt_kernel.errors import UserError
from kt_kernel.files.units import GIB, in_gib
from kt_kernel.gpu_prefill.memory import card_bytes
from kt_kernel.packed import METHODS

#: V3.2's ``config.json`` as far as its sizes depend on it.
V32_CONFIG: Mapping[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
#: What other models of the family leave out or set to null.
_OPTIONAL = (
    "first_k_dense_replace",
    "n_shared_experts",
    "num_nextn_predict_layers",
    "q_lora_rank",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
)

#: Sizes that no model comes near; fields without one are at most ``LARGEST_FIELD``.
LARGEST_FIELD = 1 << 31
_LARGEST = {"n_routed_experts": MOST_EXPERTS, "num_hidden_layers": MOST_LAYERS}

BF16, FP32 = 2, 4
#: An FP8 weight and its share of the fp32 scale of a block of 128 x 128.
FP8 = 1 + FP32 / 128**2
#: CUDA's context, the kernels' code and cuBLAS: an estimate, between 0.4 and 0.8 on most cards.
CONTEXT_BYTES = 0.6 * GIB
#: Parts into which SGLang's triton backend splits a sequence while decoding, at least, and the
#: tokens that a part has, at least.
MIN_KV_SPLITS, MIN_SPLIT_TOKENS = 8, 32
#: Of the memory that --mem-fraction-static leaves, the share for the indexer's scores in SGLang.
INDEXER_SHARE = 0.2
#: What SGLang sets aside for CUDA graphs: for each request of the decode, and for the prefill.
DECODE_GRAPH_BYTES = 2 * 2**20
PREFILL_GRAPH_BYTES = 1.5 * GIB
#: What it sets aside for NCCL, for each GPU of the group.
GROUP_BYTES = 128 * 2**20
#: Requests that SGLang makes room for when --max-running-requests does not say.
DEFAULT_REQUESTS = 2048
#: About what SGLang takes for --mem-fraction-static when nothing is said: 0.85 at 48 GB.
DEFAULT_FRACTION = 0.85


def read_gpu_config(model_path: Path) -> Mapping[str, Any]:
    """The ``config.json`` of a model whose sizes this knows, else V3.2's.

    Never fails: a file that cannot be read is reported by the check of the model.
    """
    try:
        config = ModelConfig(model_path).fields
        for name in V32_CONFIG:
            if name != "quantization_config":
                optional = name in _OPTIONAL
                most = _LARGEST.get(name, LARGEST_FIELD)
                config.integer(name, 0 if optional else 1, most, 0 if optional else None)
    except UserError:
        return V32_CONFIG
    return config.values


@dataclass(frozen=True)
class GpuMemory:
    """What one GPU holds, in bytes.

    Attributes:
        weights: all but routed experts.
        experts: routed experts that stay on the GPU.
        cache: the KV cache.
        workspace: CUDA's context, activations, graphs.
    """

    weights: float
    experts: float
    cache: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.experts + self.cache + self.workspace

    def line(self, free: float) -> str:
        """The sum as people read it, against the free bytes of the card."""
        return (
            f"weights {in_gib(self.weights)} + resident experts {in_gib(self.experts)} "
            f"+ KV {in_gib(self.cache)} + workspace {in_gib(self.workspace)} "
            f"= {in_gib(self.total)} GiB of {in_gib(free)}"
        )


@dataclass(frozen=True)
class GpuSizes:
    """The model's sizes as they count on each of ``gpus`` GPUs.

    Attributes:
        config: fields as V3.2's ``config.json`` names them.
        sparse: attention is the model's sparse one, with its indexer; dense otherwise.
        fp8_cache: the KV cache holds FP8 (SGLang's default for sparse attention on Blackwell).
        gpus: size of the tensor-parallel group.
        multiprocessors: of a card; 0 if not known.
    """

    config: Mapping[str, Any]
    sparse: bool = False
    fp8_cache: bool = False
    gpus: int = 1
    multiprocessors: int = 0

    def _get(self, name: str) -> int:
        return int(self.config.get(name) or 0)

    @property
    def weight(self) -> float:
        """Bytes of one weight of the matrices that the checkpoint may hold in FP8."""
        return FP8 if self.config.get("quantization_config") else BF16

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self._get("num_hidden_layers")

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return max(0, self.layers - self._get("first_k_dense_replace"))

    def weights(self) -> float:
        """Weights besides routed experts; what every GPU holds in full is not divided."""
        get, weight = self._get, self.weight
        hidden = get("hidden_size")
        embeddings = 1 if self.config.get("tie_word_embeddings") else 2
        divided = (
            embeddings * get("vocab_size") * hidden * BF16
            + self.layers * self._attention_divided()
            + get("first_k_dense_replace") * 3 * hidden * get("intermediate_size") * weight
            + self.moe_layers * get("n_shared_experts") * self.expert
        )
        norms = 2 * hidden + get("q_lora_rank") + get("kv_lora_rank")
        router = get("n_routed_experts") * (hidden * BF16 + FP32)
        copied = self.layers * (self._attention_copied() + norms * BF16) + self.moe_layers * router
        return divided / self.gpus + copied

    def _attention_divided(self) -> float:
        """Projections of a layer that have rows or columns for each head."""
        get = self._get
        heads, latent = get("num_attention_heads"), get("kv_lora_rank")
        nope, rope, value = (get(f"{name}_head_dim") for name in ("qk_nope", "qk_rope", "v"))
        query = (get("q_lora_rank") or get("hidden_size")) * (nope + rope)
        key_value = latent * (nope + value)
        out = value * get("hidden_size")
        # SGLang keeps kv_b_proj and, for the absorbed products, its two halves in bf16.
        return heads * ((query + key_value + out) * self.weight + key_value * BF16)

    def _attention_copied(self) -> float:
        """Projections of a layer that have nothing to do with heads, and its indexer."""
        get = self._get
        hidden, rank = get("hidden_size"), get("q_lora_rank")
        size = hidden * (rank + get("kv_lora_rank") + get("qk_rope_head_dim")) * self.weight
        if self.sparse:
            heads, width = get("index_n_heads"), get("index_head_dim")
            size += rank * heads * width * self.weight + hidden * (width + heads) * BF16
        return size

    @property
    def expert(self) -> float:
        """One routed expert of one layer on all GPUs together."""
        return 3 * self._get("hidden_size") * self._get("moe_intermediate_size") * self.weight

    def experts(self, count: int) -> float:
        """So many routed experts of every layer."""
        return min(count, self._get("n_routed_experts")) * self.moe_layers * self.expert / self.gpus

    @property
    def cache_per_token(self) -> float:
        """The KV cache of one token; every GPU holds all of it, as the latent has no heads."""
        latent = self._get("kv_lora_rank") + self._get("qk_rope_head_dim")
        size: float = latent * (1 if self.fp8_cache else BF16)
        if self.sparse:  # the indexer's keys: FP8 with a scale for each 128
            width = self._get("index_head_dim")
            size += width + width / 128 * FP32
        return self.layers * size

    def workspace(self, values: Mapping[str, Any], free: float) -> float:
        """CUDA's context, the activations of a chunk, graphs.

        Args:
            values: the settings.
            free: bytes of the card that nothing else uses.
        """
        chunk, requests = values["KT_CHUNKED_PREFILL_SIZE"], values["KT_MAX_RUNNING_REQUESTS"]
        requests = requests or DEFAULT_REQUESTS
        context = self.config["max_position_embeddings"]
        heads = self._get("num_attention_heads") / self.gpus
        size: float = CONTEXT_BYTES
        size += chunk * self._activation(values["KT_NUM_GPU_EXPERTS"])
        if values["KT_GPU_PREFILL_TOKEN_THRESHOLD"] is not None and self.moe_layers:
            # What the weights are converted with is not known here: the larger int4.
            methods = [m for m in METHODS.values() if m.kt_method == values["KT_METHOD"]]
            bits = max(m.bits + (2 / m.block_k if m.block_k else 0) for m in methods)
            hidden, intermediate = self._get("hidden_size"), self._get("moe_intermediate_size")
            size += card_bytes(hidden, intermediate, bits, chunk)
        size += requests * context * 4  # the table of each request's tokens
        size += 2 * requests * self._get("vocab_size") * FP32  # logits and probabilities
        if not self.sparse:  # the partial sums of the decode, and a maximum of each
            decoded = min(requests, _graph_requests(free))
            size += decoded * heads * self._kv_splits() * (self._get("kv_lora_rank") + 1) * FP32
        else:
            size += min(chunk * context * FP32, INDEXER_SHARE * _slack(values, free))
        if values["KT_DECODE_CUDA_GRAPH"]:
            size += requests * DECODE_GRAPH_BYTES
        if values["KT_PREFILL_CUDA_GRAPH"]:
            size += PREFILL_GRAPH_BYTES
        if self.gpus > 1:
            size += self.gpus * GROUP_BYTES
        return size

    def _kv_splits(self) -> int:
        """Parts that the triton backend makes room for (``_mla_decode_kv_splits_cap``)."""
        if not self.multiprocessors:
            return MIN_KV_SPLITS
        parts = math.ceil(self.config["max_position_embeddings"] / MIN_SPLIT_TOKENS)
        return max(MIN_KV_SPLITS, min(_power_of_two(self.multiprocessors), _power_of_two(parts)))

    def _activation(self, resident: int) -> float:
        """Bytes that live at the same time for each token of a chunk, in the widest place."""
        get = self._get
        hidden, latent = get("hidden_size"), get("kv_lora_rank")
        rope = get("qk_rope_head_dim")
        heads = get("num_attention_heads") / self.gpus
        # Queries, the same absorbed, both joined with the rotary part, and the output.
        query = get("qk_nope_head_dim") + rope
        attention = heads * (query + latent + (latent + rope) + latent)
        dense = 3 * get("intermediate_size") / self.gpus
        intermediate = get("moe_intermediate_size") / self.gpus
        top_k = get("num_experts_per_tok") if resident else 0
        routed = top_k * (3 * intermediate + hidden)  # gate and up, their product, down
        stream = 5 * hidden  # hidden states, residual, normed, the CPU experts', the sum
        return float(BF16 * (max(attention, dense, routed) + stream))

    def cache_room(self, values: Mapping[str, Any], free: float) -> float:
        """Bytes that a KV cache may take besides these settings' weights and workspace.

        SGLang gives it no more than --mem-fraction-static allows. A fiftieth of the card stays
        free besides, for what the allocator cannot use.
        """
        loaded = self.weights() + self.experts(values["KT_NUM_GPU_EXPERTS"])
        spared = max(self.workspace(values, free) + free / 50, CONTEXT_BYTES + _slack(values, free))
        return free - loaded - spared

    def memory(self, values: Mapping[str, Any], free: float) -> GpuMemory:
        """What these settings take of each GPU.

        Args:
            values: the settings, ``auto`` replaced.
            free: bytes of the card that nothing else uses; without a number of tokens, SGLang's
                KV cache takes all that --mem-fraction-static allows.
        """
        weights, experts = self.weights(), self.experts(values["KT_NUM_GPU_EXPERTS"])
        tokens = values["KT_MAX_TOTAL_TOKENS"]
        if tokens is None:
            cache = max(0.0, free - CONTEXT_BYTES - _slack(values, free) - weights - experts)
        else:
            cache = tokens * self.cache_per_token
        return GpuMemory(weights, experts, cache, self.workspace(values, free))


def _power_of_two(number: int) -> int:
    """The smallest that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _graph_requests(free: float) -> int:
    """Requests of the largest graph of a decode that SGLang captures by itself, by the card."""
    return 48 if free < 35 * GIB else 32 if free < 60 * GIB else 256


def _slack(values: Mapping[str, Any], free: float) -> float:
    """What SGLang leaves free besides weights and KV cache."""
    fraction = values["KT_MEM_FRACTION_STATIC"]
    return free * (1 - (DEFAULT_FRACTION if fraction is None else fraction))
