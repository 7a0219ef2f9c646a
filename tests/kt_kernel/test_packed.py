"""The packed layout's arithmetic and the checks on a file's header."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest

from kt_kernel import _ext, packed
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.packed import PackedLayout
from tests.kt_kernel.layer_files import LAYOUTS, write_layer

V32 = {"num_experts": 256, "hidden_size": 7168, "intermediate_size": 2048}


@pytest.mark.parametrize(("method", "bits"), [("int4", 4.13), ("int4-4x8", 4.255), ("int8", 8.00)])
def test_bits_per_weight_at_v32_shape(method: str, bits: float) -> None:
    """337 GB of INT4 for 58 layers: what the 350 GB host of the tutorial holds."""
    layout = PackedLayout(**V32, method=method)
    assert layout.bits_per_weight() == pytest.approx(bits, abs=0.005)
    assert layout.num_weights == 256 * 3 * 7168 * 2048


@pytest.mark.parametrize("method", packed.METHODS)
def test_shapes_are_the_extensions(method: str) -> None:
    layout = PackedLayout(3, 192, 320, method)
    specs = layout.tensors()
    for projection in packed.PROJECTIONS:
        n, k = layout.projection_shape(projection)
        assert specs[f"{projection}.codes"].shape == (3, *_ext.codes_shape(n, k, method))
    assert ("tables" in specs) == bool(packed.METHODS[method].block_k)


@pytest.mark.parametrize("size", [0, 32, 100, -64])
@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
def test_sizes_that_do_not_fit_a_block(name: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"{name} is {size}: expected a positive multiple of 64"):
        PackedLayout(**{**V32, name: size}, method="int4")


def test_a_good_file_passes(tmp_path: Path) -> None:
    for method, layout in LAYOUTS.items():
        path = write_layer(tmp_path / method, layout, layer_idx=5)
        header = read_header(path)
        packed.check_layer_header(header, layout, 5)
        assert header.file_size == path.stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_idx": "6"}, "has layer_idx 6, expected 5"),
        ({"hidden_size": "128"}, "has hidden_size 128, expected 256: these are weights of another"),
        ({"num_experts": "9"}, "has num_experts 9, expected 4"),
        ({"format_version": "2"}, "has format_version 2, expected 1: convert again"),
        ({"method": "int8"}, "has method int8, expected int4: set --kt-method to AMXINT8"),
        ({"format": "gguf"}, "is not a packed expert file"),
        ({"block": "4x8"}, "has block 4x8, expected 4x16"),
    ],
)
def test_metadata_of_something_else(tmp_path: Path, change: dict[str, str], message: str) -> None:
    layout = LAYOUTS["int4"]
    path = write_layer(tmp_path, layout, 5, metadata=change)
    with pytest.raises(UserError, match=message):
        packed.check_layer_header(read_header(path), layout, 5)


def test_tensor_missing_or_of_another_shape(tmp_path: Path) -> None:
    layout = LAYOUTS["int4"]
    path = write_layer(tmp_path / "a", layout, 5, drop="up.codes")
    with pytest.raises(UserError, match=r"has no tensor up\.codes: convert this layer again"):
        packed.check_layer_header(read_header(path), layout, 5)
    path = write_layer(tmp_path / "b", layout, 5, reshape="up.scales")
    with pytest.raises(UserError, match=r"up\.scales is BF16 \[\d+\], expected BF16 \[4, 64"):
        packed.check_layer_header(read_header(path), layout, 5)


@pytest.mark.parametrize("more", [-1, 1])
def test_tensor_of_another_length_than_its_shape(tmp_path: Path, more: int) -> None:
    layout = LAYOUTS["int8"]
    header = read_header(write_layer(tmp_path, layout, 5))
    entry = header.tensors["up.codes"]
    changed = dataclasses.replace(entry, end=entry.end + more)
    header = dataclasses.replace(header, tensors={**header.tensors, "up.codes": changed})
    with pytest.raises(UserError, match=r"tensor up\.codes spans \d+ bytes, expected \d+: convert"):
        packed.check_layer_header(header, layout, 5)


def test_files_that_are_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        read_header(path)
    for content, message in (
        (b"", "is truncated: 0 bytes hold no safetensors header"),
        (b"\xff" * 100, "is truncated or not a safetensors file"),
        (struct.pack("<Q", 5) + b"hello", "is not a safetensors file"),
        (struct.pack("<Q", 4) + b"[12]", "is not a safetensors file"),
        (struct.pack("<Q", 14) + b'{"a":{"b":[]}}', "is not a safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_header(path)


@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_file(tmp_path: Path, lost: int) -> None:
    path = write_layer(tmp_path, LAYOUTS["int8"], 5)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - lost)
    with pytest.raises(UserError, match=f"truncated: expected {size} bytes, found {size - lost}"):
        read_header(path)


def test_header_agrees_with_the_public_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    layout = LAYOUTS["int4"]
    path = write_layer(tmp_path, layout, 5)
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.tensors)
        assert json.loads(json.dumps(file.metadata())) == header.metadata
        tables = file.get_tensor("tables").numpy().tobytes()
    entry = header.tensors["tables"]
    assert path.read_bytes()[entry.begin : entry.end] == tables
