"""Stand-in for SGLang's CUDA kernel package on hosts without a GPU.

The real one cannot be imported without libcuda. On the CPU, SGLang imports the names
below and calls none of them; each raises if it is called. A name that is not listed
is an ImportError, as it would be with a package that does not have it.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0+stand.in"

# Imported at module level by SGLang 0.5.16 or 0.5.23 with SGLANG_USE_CPU_ENGINE=1.
STUBBED_FUNCTIONS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "causal_conv1d_fwd",
    "causal_conv1d_update",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "gptq_gemm",
    "gptq_shuffle",
    "rmsnorm",
    "verify_tree_greedy_cpu",
)


def _stub(name: str) -> Callable[..., NoReturn]:
    def stub(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called on a server without a GPU; this feature of SGLang "
            "needs one"
        )

    stub.__name__ = stub.__qualname__ = name
    return stub


globals().update({name: _stub(name) for name in STUBBED_FUNCTIONS})
