"""routed_scaling_factor reaches the GPU experts' runner as None, and SGLang needs it so."""

import ast
from types import SimpleNamespace

import pytest

from kt_kernel.sglang_plugin.scaling import scale_routed_experts_once
from tests.contract.published_wheels import PLUGIN_WHEELS, PublishedWheel
from tests.sglang_plugin.wheel_source import find, parse


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


# The defect in SGLang that the hook answers, in its source: the day one of these fails, the hook
# would make results wrong instead of right. (The runners need a GPU to be run.)


@pytest.fixture(params=PLUGIN_WHEELS, ids=str)
def wheel(request: pytest.FixtureRequest) -> PublishedWheel:
    wheel: PublishedWheel = request.param
    return wheel


@pytest.mark.parametrize("forward", ["forward_normal", "forward_normal_dual_stream"])
def test_the_model_scales_the_sum_of_gpu_and_cpu_experts(
    wheel: PublishedWheel, forward: str
) -> None:
    function = find(wheel.fetch(), f"sglang.srt.models.deepseek_v2.DeepseekV2MoE.{forward}")
    assert function is not None
    scalings = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.If)
        and "KTEPWrapperMethod" in ast.unparse(node.test)
        and ast.unparse(node.body[0]) == "final_hidden_states *= self.routed_scaling_factor"
    ]
    assert len(scalings) == 1


@pytest.mark.parametrize("runner", ["triton", "marlin"])
def test_the_gpu_runner_scales_its_experts_too(wheel: PublishedWheel, runner: str) -> None:
    module = parse(wheel.fetch(), f"sglang/srt/layers/moe/moe_runner/{runner}.py")
    assert module is not None
    passed = [
        ast.unparse(keyword.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "routed_scaling_factor"
    ]
    assert passed
    assert all(value.endswith("config.routed_scaling_factor") for value in passed)


@pytest.mark.parametrize(
    "kernel", ["moe_runner/triton_utils/fused_moe.py", "fused_moe_triton/fused_marlin_moe.py"]
)
def test_none_is_a_factor_of_one(wheel: PublishedWheel, kernel: str) -> None:
    module = parse(wheel.fetch(), f"sglang/srt/layers/moe/{kernel}")
    assert module is not None
    assert any(
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "routed_scaling_factor is None"
        and ast.unparse(node.body[0]) == "routed_scaling_factor = 1.0"
        for node in ast.walk(module)
    )
