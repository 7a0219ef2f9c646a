"""SGLang's names for its parts, as far as they make sense for models of the DeepSeek V3 family on
NVIDIA GPUs; with ``none``, KT_EXTRA_ARGS can give any other. A test looks them up in SGLang.
"""

ATTENTION_BACKENDS = (
    "triton",
    "flashinfer",
    "flashmla",
    "cutedsl_mla",
    "trtllm_mla",
    "fa3",
    "fa4",
    "dsa",
    "torch_native",
)
#: Backends that can do V3.2's sparse attention.
SPARSE_BACKENDS = ("dsa",)
TOOL_CALL_PARSERS = ("deepseekv3", "deepseekv31", "deepseekv32", "kimi_k2")
REASONING_PARSERS = ("deepseek-r1", "deepseek-v3", "kimi_k2")
