"""The model configuration a CPU can run: dense attention, unquantised layers."""

from typing import Any

DEEPSEEK_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
BLOCK_SIZE_ATTRIBUTE = "kt_fp8_block_size"
"""Where the checkpoint's FP8 block size is kept once quantization_config is cleared."""


def run_dense_and_unquantized(config: Any, *args: Any, **kwargs: Any) -> Any:
    """After ``get_config``: clear index_topk and FP8 quantization_config.

    Without index_topk SGLang builds no indexer and attends to every token; without
    quantization_config it builds plain linears, which ``fp8_loading`` fills. Other
    models and other quantisations are left to SGLang.
    """
    architectures = getattr(config, "architectures", None) or ()
    if not any(name in DEEPSEEK_ARCHITECTURES for name in architectures):
        return config
    if getattr(config, "index_topk", None) is not None:
        config.index_topk = None
    quantization = getattr(config, "quantization_config", None)
    # get_config caches: the same object comes by again, already cleared.
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return config
    if quantization.get("weight_block_size"):
        setattr(config, BLOCK_SIZE_ATTRIBUTE, tuple(quantization["weight_block_size"]))
    config.quantization_config = None
    return config
