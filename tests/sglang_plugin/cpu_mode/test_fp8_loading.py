"""Dequantising and filtering a checkpoint's tensors on their way into SGLang."""

from typing import Any

import pytest
import torch

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin.cpu_mode.fp8_loading import (
    dequantize_blocks,
    dequantized,
    needed_weights,
)

BLOCK = (128, 128)


def fp8_pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.5
    return weight, scale


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (192, 128), (1, 130), (300, 64)])
def test_every_element_is_weight_times_its_blocks_scale(shape: tuple[int, int]) -> None:
    weight, scale = fp8_pair(*shape)
    result = dequantize_blocks("w", weight, scale, BLOCK, torch.float32)
    for row in range(shape[0]):
        for column in (0, shape[1] // 2, shape[1] - 1):
            expected = weight[row, column].float() * scale[row // 128, column // 128]
            assert result[row, column] == expected


def test_the_runs_dtype_rounds_once() -> None:
    weight, scale = fp8_pair(200, 200)
    exact = dequantize_blocks("w", weight, scale, BLOCK, torch.float32)
    assert torch.equal(
        dequantize_blocks("w", weight, scale, BLOCK, torch.bfloat16), exact.bfloat16()
    )


@pytest.mark.parametrize("scale_first", [False, True])
def test_pairs_meet_in_either_order_and_others_pass_through(scale_first: bool) -> None:
    weight, scale = fp8_pair(128, 256)
    norm = torch.ones(4, dtype=torch.bfloat16)
    pair = [("a.weight", weight), ("a.weight_scale_inv", scale)]
    if scale_first:
        pair.reverse()
    stream = [pair[0], ("norm.weight", norm), pair[1]]
    result = dict(dequantized(stream, BLOCK, torch.bfloat16))
    assert set(result) == {"a.weight", "norm.weight"}
    assert result["norm.weight"] is norm
    assert result["a.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kept", "missing"), [(0, "a.weight_scale_inv"), (1, r"a.weight ")], ids=["scale", "weight"]
)
def test_half_a_pair_is_an_error_that_names_the_other_half(kept: int, missing: str) -> None:
    weight, scale = fp8_pair(128, 128)
    pair = [("a.weight", weight), ("a.weight_scale_inv", scale)]
    with pytest.raises(UserError, match=f"no tensor {missing}"):
        list(dequantized([pair[kept]], BLOCK, torch.bfloat16))


def test_scale_of_the_wrong_shape_is_an_error_with_both_shapes() -> None:
    weight, scale = fp8_pair(256, 256)
    with pytest.raises(
        UserError, match=r"a.weight_scale_inv has shape \(2, 1\); expected \(2, 2\)"
    ):
        list(
            dequantized(
                [("a.weight", weight), ("a.weight_scale_inv", scale[:, :1])], BLOCK, torch.float32
            )
        )


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.3.mlp.gate.weight",
    "model.layers.3.mlp.shared_experts.up_proj.weight",
    "model.layers.3.mlp.experts.0.up_proj.weight",
    "model.layers.3.mlp.experts.1.up_proj.weight_scale_inv",
    "model.layers.3.mlp.experts.10.down_proj.weight",
    "model.layers.3.self_attn.indexer.wk.weight",
    "model.layers.3.self_attn.q_a_proj.weight",
    "model.layers.4.mlp.experts.0.up_proj.weight",
    "model.layers.4.eh_proj.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("resident", "experts"),
    [({3: []}, []), ({3: [0]}, [0]), ({2: [0], 3: [10, 1]}, [1, 10]), ({}, [0, 1, 10])],
)
def test_unused_tensors_are_dropped_unread(
    resident: dict[int, list[int]], experts: list[int]
) -> None:
    class Unread:
        """Any use of the tensor but passing it on is an AttributeError."""

        __slots__ = ()

    stream: Any = [(name, Unread()) for name in NAMES]
    kept = [name for name, _ in needed_weights(stream, 4, resident)]
    expected = [name for name in NAMES if ".indexer." not in name and ".layers.4." not in name]
    expected = [
        name
        for name in expected
        if ".mlp.experts." not in name or int(name.split(".")[5]) in experts
    ]
    assert kept == expected
