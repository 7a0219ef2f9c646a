"""A MoE layer on the CPU: SGLang's own ("GPU") experts in torch, the rest in kt_kernel."""

from typing import Any

import torch
from torch.nn.functional import linear, silu

NO_STREAM = 0
"""kt_kernel's stream argument for CPU tensors."""


def process_weights_after_loading(method: Any, layer: torch.nn.Module) -> None:
    """``KTEPWrapperMethod.process_weights_after_loading`` without the CUDA synchronise."""
    from sglang.srt.eplb.expert_location_dispatch import get_global_expert_location_metadata

    if hasattr(method.gpu_method, "process_weights_after_loading"):
        method.gpu_method.process_weights_after_loading(layer)
    if method.wrapper is not None:
        locations = get_global_expert_location_metadata().physical_to_logical_map_cpu
        method.wrapper.load_weights(locations[method.kt_config.layer_idx].contiguous())


def apply(method: Any, layer: Any, dispatch_output: Any) -> Any:
    """``KTEPWrapperMethod.apply`` on CPU tensors.

    Experts below ``num_gpu_experts`` are computed here from the layer's unquantised
    weights, all others by kt_kernel meanwhile. The ids are left as they are:
    kt_kernel skips resident ones itself.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.moe.topk import TopKOutputChecker

    config = method.moe_runner_config
    if config.activation != "silu" or config.apply_router_weight_on_input:
        raise NotImplementedError(
            "CPU mode runs SwiGLU experts weighted after the down projection; this model has "
            f"activation={config.activation!r}, "
            f"apply_router_weight_on_input={config.apply_router_weight_on_input}"
        )
    x = dispatch_output.hidden_states
    topk_output = dispatch_output.topk_output
    if TopKOutputChecker.format_is_bypassed(topk_output):
        topk_output = topk_output.to_standard()
    topk_weights, topk_ids, _ = topk_output

    if method.wrapper is not None:
        method.wrapper.submit_forward(x, topk_ids, topk_weights, NO_STREAM)
    output = resident_experts_output(layer.w13_weight, layer.w2_weight, x, topk_ids, topk_weights)
    if method.wrapper is not None:
        # Not in place on what kt_kernel returns: the model scales our result in place.
        output = output + method.wrapper.sync_forward(x, NO_STREAM)
    return StandardCombineInput(hidden_states=output)


def resident_experts_output(
    w13: torch.Tensor,
    w2: torch.Tensor,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum [T, H], in x's dtype, of the experts whose weights are given.

    w13 [R, 2I, H] holds gate above up, w2 [R, H, I]; topk_ids [T, k] and topk_weights
    [T, k] may name experts >= R and -1, which contribute nothing.
    """
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(w13.shape[0]):
        tokens, slots = torch.nonzero(topk_ids == expert, as_tuple=True)
        if tokens.numel() == 0:
            continue
        gate, up = linear(x[tokens], w13[expert]).chunk(2, dim=-1)
        down = linear(silu(gate) * up, w2[expert])
        total.index_add_(0, tokens, down.float() * topk_weights[tokens, slots].float()[:, None])
    return total.to(x.dtype)
