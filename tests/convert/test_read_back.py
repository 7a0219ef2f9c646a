"""Reading a written file back finds what it is there to find."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.read_back import (
    error_limit,
    relative_error,
    sample_experts,
    verify_layer_file,
)
from convert.source.checkpoint import Checkpoint
from convert.source.decode import decode_fp8_e4m3
from convert.source.experts import ExpertProjection, ExpertSource
from convert.source.formats import FORMATS
from convert.workers import StopRequest
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.packed import PackedLayout
from tests.convert.fake_checkpoint import fake_checkpoint

LAYOUT = PackedLayout(3, 128, 64, "int4")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def test_decode_fp8_all_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(decode_fp8_e4m3(codes), expected)


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp16"])
def test_source_weights_are_exact(tmp_path: Path, dtype: str) -> None:
    fake = fake_checkpoint(dtype, 320, 192, num_experts=1, num_layers=2)
    with Checkpoint(fake.write(tmp_path / "model")) as checkpoint:
        source = ExpertSource(checkpoint, dtype)
        for item in source.items(1):
            got = source.weights(item)
            np.testing.assert_array_equal(got, fake.reference[item.weight])


def test_sound_file_passes(source: Path, converted: Path, pool: ThreadPoolExecutor) -> None:
    with Checkpoint(source) as checkpoint:
        path = converted / "layer-002.safetensors"
        _, errors = verify_layer_file(
            path, 2, LAYOUT, ExpertSource(checkpoint, "fp8"), pool, StopRequest()
        )
    assert len(errors) == 6  # experts 0 and 2
    assert all(0.03 < error < 0.1 for error in errors.values())


@pytest.mark.parametrize("tensor", ["gate.codes", "up.table_index", "down.scales"])
def test_slices_of_two_experts_swapped(
    source: Path, converted: Path, tmp_path: Path, pool: ThreadPoolExecutor, tensor: str
) -> None:
    path = Path(shutil.copy(converted / "layer-002.safetensors", tmp_path))
    entry = read_header(path).tensors[tensor]
    size = (entry.end - entry.begin) // 3
    content = bytearray(path.read_bytes())
    first = content[entry.begin : entry.begin + size]
    content[entry.begin : entry.begin + size] = content[entry.end - size : entry.end]
    content[entry.end - size : entry.end] = first
    path.write_bytes(content)
    with Checkpoint(source) as checkpoint, pytest.raises(UserError) as raised:
        verify_layer_file(path, 2, LAYOUT, ExpertSource(checkpoint, "fp8"), pool, StopRequest())
    assert str(path) in str(raised.value)
    assert "model.layers.2.mlp.experts." in str(raised.value)


def test_file_of_another_layer(source: Path, converted: Path, pool: ThreadPoolExecutor) -> None:
    path = converted / "layer-001.safetensors"
    with Checkpoint(source) as checkpoint, pytest.raises(UserError, match="has layer_idx 1"):
        verify_layer_file(path, 2, LAYOUT, ExpertSource(checkpoint, "fp8"), pool, StopRequest())


def test_sample_has_first_and_last() -> None:
    assert sample_experts(5, 256) == [0, 155, 255]
    assert sample_experts(5, 1) == [0]
    assert all(max(sample_experts(layer, 7)) == 6 for layer in range(60))


def test_relative_error_of_extreme_values() -> None:
    zero = np.zeros((4, 8), np.float32)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-20, zero) == np.inf
    for scale in (1e-30, 1.0, 1e30):  # the squares do not fit into float32
        reference = np.full((4, 8), scale, np.float32)
        assert relative_error(reference * np.float32(1.5), reference) == pytest.approx(0.5)


def test_error_limit_allows_for_outliers_and_no_more() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 1024)).astype(np.float32)
    for method, limit in (("int4", 0.3), ("int8", 0.02)):
        assert limit < error_limit(weights, method) < limit + 0.01
    weights[:, 0] = 1000
    assert error_limit(weights, "int8") > 0.1


def test_one_outlier_per_row_converts(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Legitimate if unkind weights must not be taken for a damaged file."""
    from convert.command import main

    def values(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        drawn = rng.standard_normal(shape) * 0.02
        drawn[:, 3] = 5.0
        return drawn

    model = fake_checkpoint("bf16", num_layers=2, values=values).write(tmp_path / "model")
    for method in ("int4", "int8"):
        output = tmp_path / method
        argv = ["--input-path", str(model), "--output", str(output), "--input-type", "bf16"]
        assert main([*argv, "--quant-method", method]) == 0


def test_item_names() -> None:
    item = ExpertProjection(7, 12, "down")
    assert item.weight == "model.layers.7.mlp.experts.12.down_proj.weight"
    assert FORMATS["fp8"].suffixes == ("", "_scale_inv")
