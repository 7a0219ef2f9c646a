"""routed_scaling_factor reaches the GPU experts' runner as None."""

from types import SimpleNamespace

from kt_kernel.sglang_plugin.scaling import scale_routed_experts_once


def test_the_runner_gets_no_factor_and_the_same_configuration() -> None:
    config = SimpleNamespace(routed_scaling_factor=2.5, num_local_experts=256)
    (method, layer, passed_on), keywords = scale_routed_experts_once("method", "layer", config)
    assert (method, layer, keywords) == ("method", "layer", {})
    assert passed_on is config
    assert config.routed_scaling_factor is None
    assert config.num_local_experts == 256


def test_arguments_may_come_by_keyword() -> None:
    config = SimpleNamespace(routed_scaling_factor=2.5)
    scale_routed_experts_once("method", layer="layer", moe_runner_config=config)
    assert config.routed_scaling_factor is None
