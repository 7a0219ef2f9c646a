"""The self-test of a loaded layer: sound ones pass, and what is wrong in memory is found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_kernel import KTMoEWrapper, packed
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.self_test import check_layer
from tests.kt_kernel.layer_files import write_layer

EXPERTS, TOP_K = 10, 2


def layout_of(method: str) -> packed.PackedLayout:
    return packed.PackedLayout(EXPERTS, 256, 128, method)


def open_layer(folder: Path, method: str, **kwargs: Any) -> KTMoEWrapper:
    return KTMoEWrapper(
        layer_idx=3,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=256,
        moe_intermediate_size=128,
        cpuinfer_threads=2,
        weight_path=str(folder),
        method=packed.METHODS[method].kt_method,
        **kwargs,
    )


def loaded(folder: Path, method: str, **kwargs: Any) -> KTMoEWrapper:
    wrapper = open_layer(folder, method, **kwargs)
    wrapper.load_weights(torch.arange(EXPERTS))
    return wrapper


@pytest.mark.parametrize("pools", [1, 2])
def test_a_sound_layer_passes(
    tmp_path: Path, method: str, target: str, pools: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_layer(tmp_path, layout_of(method), 3)
    wrapper = open_layer(tmp_path, method, threadpool_count=pools, num_gpu_experts=1)
    wrapper.load_weights(torch.tensor([9, 0, 3, 1, 2, 8, 7, 6, 5, 4]))
    with caplog.at_level(logging.INFO):
        check_layer(wrapper)
    assert "self-test of layer 3: 4 experts give the bits of target scalar" in caplog.text


def test_deferral_is_no_mistake(tmp_path: Path) -> None:
    write_layer(tmp_path, layout_of("int8"), 3)
    check_layer(loaded(tmp_path, "int8", max_deferred_experts_per_token=1))
    assert KTMoEWrapper._deferred is None


@pytest.mark.parametrize("number", [EXPERTS, EXPERTS - 1])
def test_few_or_no_experts_on_the_cpu(tmp_path: Path, number: int) -> None:
    write_layer(tmp_path, layout_of("int4"), 3)
    check_layer(loaded(tmp_path, "int4", num_gpu_experts=number))


# A byte in the middle of the first expert, which is among those that are compared.
@pytest.mark.parametrize("projection", packed.PROJECTIONS)
@pytest.mark.parametrize("part", ["codes", "scales", "table_index"])
def test_a_damaged_byte_in_memory_is_found(tmp_path: Path, projection: str, part: str) -> None:
    method = "int4" if part == "table_index" else "int8"
    path = write_layer(tmp_path, layout_of(method), 3)
    entry = read_header(path).tensors[f"{projection}.{part}"]
    sound = path.read_bytes()
    place = entry.begin + (entry.end - entry.begin) // EXPERTS // 2
    changed = sound[place] ^ 0x41
    path.write_bytes(sound[:place] + bytes([changed]) + sound[place + 1 :])
    wrapper = loaded(tmp_path, method)  # memory holds the damaged byte,
    path.write_bytes(sound)  # the file no longer
    with pytest.raises(UserError, match=r"self-test of layer 3: .* those of the weights in layer-"):
        check_layer(wrapper)


def test_experts_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    write_layer(tmp_path, layout_of("int4"), 3)
    wrapper = loaded(tmp_path, "int4")
    other = loaded(tmp_path, "int4")
    other.load_weights(torch.arange(EXPERTS).flip(0))
    wrapper._weights.layer = other._weights.layer
    with pytest.raises(UserError, match="self-test of layer 3: 512 of 512 outputs for 2 tokens"):
        check_layer(wrapper)


def test_outputs_that_are_no_numbers_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data path that loses the result, as a copy from a card might."""
    write_layer(tmp_path, layout_of("int4"), 3)
    wrapper = loaded(tmp_path, "int4")
    sync = KTMoEWrapper.sync_forward

    def lose(self: KTMoEWrapper, x: torch.Tensor, cuda_stream: int = 0) -> torch.Tensor:
        result = sync(self, x, cuda_stream)
        return result.fill_(torch.nan) if self.target != "scalar" else result

    if wrapper.target == "scalar":
        monkeypatch.setenv("KT_TARGET", "avx2")
        wrapper = loaded(tmp_path, "int4")
    monkeypatch.setattr(KTMoEWrapper, "sync_forward", lose)
    with pytest.raises(UserError, match="self-test of layer 3"):
        check_layer(wrapper)


def test_a_file_that_is_gone_is_one_error(tmp_path: Path) -> None:
    path = write_layer(tmp_path, layout_of("int4"), 3)
    wrapper = loaded(tmp_path, "int4")
    path.unlink()
    with pytest.raises(UserError, match=r"layer-003\.safetensors does not exist"):
        check_layer(wrapper)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(
    tmp_path: Path, method: str, graphs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_layer(tmp_path, layout_of(method), 3)
    with caplog.at_level(logging.INFO):
        check_layer(loaded(tmp_path, method), "cuda", graphs)
    assert ("in CUDA graphs too" in caplog.text) == graphs
