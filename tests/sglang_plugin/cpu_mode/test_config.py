"""The configuration CPU mode runs: dense attention, no FP8 linears."""

from types import SimpleNamespace

import pytest

from kt_kernel.sglang_plugin.cpu_mode.config import BLOCK_SIZE_ATTRIBUTE, run_dense_and_unquantized

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("architecture", ["DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"])
def test_deepseek_becomes_dense_and_unquantized(architecture: str) -> None:
    config = SimpleNamespace(
        architectures=[architecture], index_topk=2048, quantization_config=dict(FP8)
    )
    assert run_dense_and_unquantized(config, "path", trust_remote_code=True) is config
    assert config.index_topk is None
    assert config.quantization_config is None
    # SGLang's get_config caches, so the same object comes back.
    run_dense_and_unquantized(config, "path")
    assert getattr(config, BLOCK_SIZE_ATTRIBUTE) == (128, 128)


@pytest.mark.parametrize("block", [{}, {"weight_block_size": None}])
def test_fp8_without_a_block_size_keeps_the_usual_one(block: dict[str, None]) -> None:
    config = SimpleNamespace(
        architectures=["DeepseekV3ForCausalLM"], quantization_config={"quant_method": "fp8"} | block
    )
    run_dense_and_unquantized(config)
    assert config.quantization_config is None
    assert not hasattr(config, BLOCK_SIZE_ATTRIBUTE)


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(architectures=["LlamaForCausalLM"], quantization_config=dict(FP8)),
        SimpleNamespace(
            architectures=["DeepseekV3ForCausalLM"], quantization_config={"quant_method": "awq"}
        ),
        SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]),
        SimpleNamespace(architectures=None),
    ],
)
def test_the_rest_is_left_to_sglang(config: SimpleNamespace) -> None:
    before = vars(config).copy()
    run_dense_and_unquantized(config)
    assert vars(config) == before
