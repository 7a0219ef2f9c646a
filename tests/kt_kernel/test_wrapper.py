"""KTMoEWrapper's arguments, weight files and call order: what works and what is refused how."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from kt_kernel import KTMoEWrapper, packed
from kt_kernel.errors import UserError
from tests import reference
from tests.kt_kernel.layer_files import LAYOUTS, write_layer
from tests.layers import RandomLayer, random_batch
from tests.shapes import LayerShape

ARGUMENTS: dict[str, Any] = {
    "layer_idx": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "num_gpu_experts": 0,
    "cpuinfer_threads": 1,
    "threadpool_count": 1,
    "weight_path": None,
    "chunked_prefill_size": 64,
    "method": "AMXINT4",
    "max_deferred_experts_per_token": 0,
}
SHAPE = LayerShape(4, 2, 256, 64)
IDENTITY = torch.arange(4)


@pytest.mark.parametrize("method", packed.METHODS)
def test_a_file_gives_what_its_weights_mean(tmp_path: Path, method: str) -> None:
    """Read from disk against dequantised with the public reader, in an order of the map's."""
    from safetensors import safe_open

    path = write_layer(tmp_path, LAYOUTS[method], 3)
    wrapper = KTMoEWrapper(
        **{**ARGUMENTS, "weight_path": str(tmp_path), "method": packed.METHODS[method].kt_method}
    )
    order = torch.tensor([2, 0, 3, 1])
    wrapper.load_weights(order)
    experts = {}
    with safe_open(path, framework="pt") as file:
        for slot, expert in enumerate(order.tolist()):

            def part(name: str, expert: int = expert) -> np.ndarray:
                tensor: torch.Tensor = file.get_tensor(name)[expert]
                bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
                return bits.numpy().view("u1") if name.endswith("codes") else bits.numpy()

            gate, up, down = (
                reference.dequantize(
                    {
                        key: part(f"{name}.{key}")
                        for key in ("codes", "scales", "table_index")
                        if f"{name}.{key}" in file.keys()  # noqa: SIM118
                    },
                    *LAYOUTS[method].projection_shape(name),
                    method,
                )
                for name in ("gate", "up", "down")
            )
            experts[slot] = gate, up, down
    x, ids, weights = random_batch(SHAPE, 11)
    want = reference.moe(x.numpy(), ids.numpy(), weights.numpy(), experts, True)
    reference.assert_same(wrapper.forward(x, ids, weights, 0), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "LLAMAFILE"}, "'LLAMAFILE': expected one of AMXINT4, AMXINT8"),
        ({"method": ["AMXINT4"]}, r"\['AMXINT4'\]: expected one of"),
        ({"hidden_size": 200}, "hidden_size is 200: expected a positive multiple of 64"),
        ({"num_gpu_experts": 5}, "num_gpu_experts .* is 5: expected 0 to 4"),
        ({"num_gpu_experts": -1}, "is -1: expected 0 to 4"),
        ({"cpuinfer_threads": 0}, "cpuinfer_threads is 0: expected at least 1"),
        ({"threadpool_count": 0}, "threadpool_count is 0: expected at least 1"),
        # Beyond what the extension's types hold, and what would be rounded.
        ({"threadpool_count": 2**32 + 1}, "threadpool_count is 4294967297: expected 1 to 1024"),
        ({"threadpool_count": 1.5}, "threadpool_count is 1.5: expected an integer"),
        ({"cpuinfer_threads": 2.5}, "cpuinfer_threads is 2.5: expected an integer"),
        ({"layer_idx": -1}, "layer_idx is -1: expected 0 to"),
        ({"layer_idx": 2**32}, "layer_idx is 4294967296: expected 0 to"),
        ({"num_experts": 2**32 + 4}, "number of experts is 4294967300: expected at least 1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5: expected 1 to 4"),
        ({"hidden_size": 2**32 + 256}, "hidden_size is 4294967552: expected a positive"),
        ({"moe_intermediate_size": 64.0}, "moe_intermediate_size is 64.0: expected an integer"),
        ({"num_gpu_experts": 1.5}, "num_gpu_experts .* is 1.5: expected an integer"),
        ({"num_gpu_experts": 2**32}, "num_gpu_experts .* is 4294967296: expected 0 to 4"),
        ({"max_deferred_experts_per_token": 0.5}, "max_deferred_experts_per_token .* is 0.5"),
        ({"mode": "sft"}, "mode is 'sft'"),
        ({"max_deferred_experts_per_token": -1}, "max_deferred_experts_per_token .* is -1"),
        ({"swiglu_limit": 10.0}, "swiglu_limit 10.0"),
        ({"gpu_experts_mask": torch.ones(3, dtype=torch.bool)}, "gpu_experts_mask is torch.bool"),
        (
            {"num_gpu_experts": 2, "gpu_experts_mask": torch.ones(4, dtype=torch.bool)},
            "both num_gpu_experts and gpu_experts_mask",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KTMoEWrapper(**{**ARGUMENTS, **change})


def test_kt_target_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_TARGET", "sse9")
    with pytest.raises(UserError, match="KT_TARGET: target 'sse9' is unknown: expected one of"):
        KTMoEWrapper(**ARGUMENTS)


def test_weight_path_problems(tmp_path: Path) -> None:
    def load(**change: Any) -> None:
        KTMoEWrapper(**{**ARGUMENTS, **change}).load_weights(IDENTITY)

    with pytest.raises(UserError, match="weight_path is not set"):
        load()
    with pytest.raises(UserError, match="does not exist: run python -m convert first"):
        load(weight_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"layer-003\.safetensors does not exist"):
        load(weight_path=str(tmp_path))
    write_layer(tmp_path, LAYOUTS["int8"], 3)
    with pytest.raises(UserError, match="method int8, expected int4: set --kt-method to AMXINT8"):
        load(weight_path=str(tmp_path))
    with pytest.raises(UserError, match="these are weights of another model"):
        load(weight_path=str(tmp_path), method="AMXINT8", hidden_size=128)


@pytest.mark.parametrize(
    "sources",
    [
        [0, 1, 2],
        [0, 1, 2, 4],
        [-1, 0, 1, 2],
        [0, 1, 2, 2**32 + 3],
        [0.0, 1.0, 2.0, 3.0],
        [[0, 1, 2, 3]],
        [False, True, True, True],
    ],
)
def test_bad_expert_map(tmp_path: Path, sources: list[Any]) -> None:
    write_layer(tmp_path, LAYOUTS["int4"], 3)
    wrapper = KTMoEWrapper(**{**ARGUMENTS, "weight_path": str(tmp_path)})
    with pytest.raises(UserError, match="physical_to_logical_map"):
        wrapper.load_weights(torch.tensor(sources))


def test_experts_on_the_gpu_are_those_of_its_slots() -> None:
    """With a map, slot 0 is on the GPU whatever expert it holds, and all others are here."""
    layer = RandomLayer(SHAPE)
    wrapper = layer.wrapper("int8", num_gpu_experts=1)
    order = torch.tensor([2, 0, 3, 1])
    wrapper.load_weights_from_tensors(layer.gate, layer.up, layer.down, order)
    weights_of = layer.packed("int8")
    experts = {slot: weights_of[e] for slot, e in enumerate(order.tolist()) if slot != 0}
    x, ids, weights = random_batch(SHAPE, 6)
    want = reference.moe(x.numpy(), ids.numpy(), weights.numpy(), experts, True)
    reference.assert_same(wrapper.forward(x, ids, weights, 0), want)


def test_bad_tensors() -> None:
    layer = RandomLayer(SHAPE)
    wrapper = KTMoEWrapper(**ARGUMENTS)
    with pytest.raises(UserError, match=r"down_proj is torch.bfloat16 \[4, 64, 256\]: expected"):
        wrapper.load_weights_from_tensors(layer.gate, layer.up, layer.up, IDENTITY)
    with pytest.raises(UserError, match=r"gate_proj is torch\.int32"):
        wrapper.load_weights_from_tensors(layer.gate.int(), layer.up, layer.down, IDENTITY)
    with pytest.raises(UserError, match="gate_proj is None: expected bfloat16"):
        wrapper.load_weights_from_tensors(cast(torch.Tensor, None), layer.up, layer.down, IDENTITY)
    layer.up[2, 7, 9] = float("inf")
    with pytest.raises(UserError, match="layer 3: weight at row 7, column 9 is inf"):
        wrapper.load_weights_from_tensors(layer.gate, layer.up, layer.down, IDENTITY)


def test_bad_calls() -> None:
    wrapper = RandomLayer(SHAPE).wrapper("int4")
    x, ids, weights = random_batch(SHAPE, 5)
    for args, message in (
        ((x[:, :64], ids, weights), "hidden_states is"),
        ((x.half(), ids, weights), "hidden_states is torch.float16"),
        (
            (cast(torch.Tensor, x.tolist()), ids, weights),
            "hidden_states is list: expected a tensor",
        ),
        ((cast(torch.Tensor, None), ids, weights), "hidden_states is NoneType: expected a tensor"),
        ((x, ids.to_sparse(), weights), "topk_ids is torch.sparse_coo: expected a dense"),
        ((x, ids[:4], weights), "topk_ids is"),
        ((x, ids.float(), weights), "topk_ids is torch.float32"),
        ((x, ids, weights.half()), "topk_weights is torch.float16"),
        ((x, torch.full_like(ids, 4), weights), r"expert id 4 of token 0 is outside \[0, 4\)"),
        ((x, torch.full_like(ids, -2), weights), "expert id -2"),
        # In int32 these are 1, padding, and 0.
        ((x, torch.full((5, 2), 2**32 + 1), weights), "expert id 4294967297 of token 0 is outside"),
        ((x, torch.full((5, 2), 2**32 - 1), weights), "expert id 4294967295"),
        ((x, torch.full((5, 2), -(2**63)), weights), "expert id -9223372036854775808"),
        ((x, ids.float(), weights), "topk_ids is torch.float32"),
        ((x, ids, weights.double()), "topk_weights is torch.float64"),
        ((x, ids.to("meta"), weights), "topk_ids on meta and .*: expected one device"),
    ):
        with pytest.raises(UserError, match=message):
            wrapper.forward(*args, 0)
    with pytest.raises(UserError, match="sync_forward without submit_forward"):
        wrapper.sync_forward(x, 0)
    wrapper.submit_forward(x, ids, weights, 0)
    with pytest.raises(UserError, match="submit_forward without sync_forward before it"):
        wrapper.submit_forward(x, ids, weights, 0)
    # None of these mistakes spoils the next call.
    assert torch.isfinite(wrapper.sync_forward(x, 0)).all()


def test_forward_before_weights_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the layer has no weights: call load_weights first"):
        KTMoEWrapper(**ARGUMENTS).forward(*random_batch(SHAPE, 1), 0)


def test_a_call_after_a_fork_is_an_error() -> None:
    """The workers stay behind: a call in the child would wait for ever."""
    wrapper = RandomLayer(SHAPE).wrapper("int8")
    call = random_batch(SHAPE, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            wrapper.forward(*call)
        except UserError as error:
            os._exit(0 if "this process was forked" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.isfinite(wrapper.forward(*call)).all()


def test_capture_sizes() -> None:
    KTMoEWrapper.set_capture_batch_sizes([1, 2, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 4]
    KTMoEWrapper.clear_buffer_cache()
    assert KTMoEWrapper.get_capture_batch_sizes() == []


def test_a_default_device_changes_nothing() -> None:
    """SGLang makes its layers under ``torch.device("cuda")``; "meta" tensors have no memory."""
    layer = RandomLayer(SHAPE)
    batch = random_batch(SHAPE, 4)
    want = layer.wrapper("int4", num_gpu_experts=1).forward(*batch, 0)
    identity = torch.arange(SHAPE.num_experts)
    with torch.device("meta"):
        wrapper = KTMoEWrapper(**{**ARGUMENTS, "num_gpu_experts": 1})
        wrapper.load_weights_from_tensors(layer.gate, layer.up, layer.down, identity)
        assert torch.equal(wrapper.forward(*batch, 0), want)


def test_dropping_a_wrapper_with_a_call_pending_is_safe() -> None:
    layer = RandomLayer(SHAPE)
    for _ in range(20):
        wrapper = layer.wrapper("int4")
        wrapper.submit_forward(*random_batch(SHAPE, 64), 0)
        del wrapper
