"""routed_scaling_factor, once."""

from typing import Any


def scale_routed_experts_once(
    method: Any, layer: Any, moe_runner_config: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before ``KTEPWrapperMethod.create_moe_runner``: take the factor from the GPU's runner.

    With KT the model multiplies the sum of GPU and CPU experts by
    routed_scaling_factor. CPU experts do not apply it themselves, but the runner of
    the GPU experts does: their share comes out 2.5 times too large on DeepSeek V3.2.
    The configuration is changed in place, not copied, because SGLang goes on filling
    it in after this call.
    """
    moe_runner_config.routed_scaling_factor = None
    return (method, layer, moe_runner_config), {}
