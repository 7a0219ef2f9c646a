"""config.json and generation_config.json of the tiny checkpoint.

Every field that DeepSeek V3.2's published config.json has is here under the same name. Sizes are
small; everything that is not a size (routing method, rope scaling, quantisation ...) has the
published value, so that code which branches on it takes the branch it takes for the real model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BLOCK = 128
"""Edge of a quantisation block: one scale per 128 x 128 weights."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the tiny model; defaults give a checkpoint of about ten megabytes.

    Chosen so that each awkward case of the real model exists in small: several dense and several
    MoE layers, experts in groups of which only some are eligible, and a projection whose row count
    (``kv_lora_rank + qk_rope_head_dim``) is not a multiple of the quantisation block.
    """

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 2
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 4
    index_head_dim: int = 128
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    num_nextn_predict_layers: int = 1

    @property
    def moe_layers(self) -> range:
        """Indices of the main model's MoE layers; the MTP layer is not among them."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def mtp_layers(self) -> range:
        """Indices of the multi-token-prediction layers, which follow the main model's layers."""
        first = self.num_hidden_layers
        return range(first, first + self.num_nextn_predict_layers)


def model_config(sizes: TinySizes, dtype: str) -> dict[str, Any]:
    """Return config.json as a dictionary.

    ``dtype`` is "fp8" or "bf16"; only "fp8" carries ``quantization_config``.
    """
    config: dict[str, Any] = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": sizes.first_k_dense_replace,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "index_head_dim": sizes.index_head_dim,
        "index_n_heads": sizes.index_n_heads,
        "index_topk": 2048,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "kv_lora_rank": sizes.kv_lora_rank,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v32",
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": sizes.n_group,
        "n_routed_experts": sizes.n_routed_experts,
        "n_shared_experts": sizes.n_shared_experts,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.num_attention_heads,
        "num_experts_per_tok": sizes.num_experts_per_tok,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_attention_heads,
        "num_nextn_predict_layers": sizes.num_nextn_predict_layers,
        "q_lora_rank": sizes.q_lora_rank,
        "qk_nope_head_dim": sizes.qk_nope_head_dim,
        "qk_rope_head_dim": sizes.qk_rope_head_dim,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [BLOCK, BLOCK],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": sizes.topk_group,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.2",
        "use_cache": True,
        "v_head_dim": sizes.v_head_dim,
        "vocab_size": sizes.vocab_size,
    }
    if dtype == "bf16":
        del config["quantization_config"]
    return config


def generation_config() -> dict[str, Any]:
    """Return generation_config.json as a dictionary (DeepSeek's published sampling defaults)."""
    return {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "transformers_version": "4.46.3",
    }
