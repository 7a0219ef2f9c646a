"""The streaming writer makes the same file as the public library, and refuses to be misused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from convert import writer as writer_module
from convert.workers import StopRequest
from convert.writer import LayerWriter, file_bytes, hash_range, layer_header
from kt_kernel.files.safetensors_header import raw_type
from kt_kernel.packed import PackedLayout
from tests.convert.helpers import raw_bits


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def random_tensors(layout: PackedLayout) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(-100, 100, spec.shape).astype(raw_type(spec.dtype))
        for name, spec in layout.tensors().items()
    }


def fill(writer: LayerWriter, tensors: dict[str, np.ndarray]) -> None:
    """Last expert first: the order must not matter."""
    for name, values in tensors.items():
        if name == "tables":
            writer.write_tensor(name, values)
            continue
        for expert in reversed(range(len(values))):
            writer.write_expert(name, expert, values[expert])


@pytest.mark.parametrize("method", ["int4", "int8"])
@pytest.mark.parametrize("num_experts", [1, 5])
def test_public_library_reads_it(
    tmp_path: Path, pool: ThreadPoolExecutor, method: str, num_experts: int
) -> None:
    layout = PackedLayout(num_experts, 128, 64, method)
    tensors = random_tensors(layout)
    path = tmp_path / "layer-001.safetensors"
    with LayerWriter(path, layout, {"layer_idx": "1", "text": 'ü"\\'}) as writer:
        fill(writer, tensors)
        writer.seal(pool, StopRequest())
        assert not path.exists()
        writer.publish()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size == writer.size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(raw_bits(loaded[name]), values, strict=True)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["text"] == 'ü"\\'
        assert set(json.loads(file.metadata()["tensor_sha256"])) == set(tensors)


def test_contents_and_then_the_name_are_flushed(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves: nothing under the final name but a whole file, and that for good."""
    layout = PackedLayout(1, 64, 64, "int8")
    done: list[object] = []
    fsync, replace, pwrite = os.fsync, os.replace, os.pwrite

    def noted(operation: Callable[..., Any], note: Callable[..., object]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            done.append(note(*args))
            return operation(*args)

        return run

    monkeypatch.setattr(os, "fsync", noted(fsync, lambda fd: os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "replace", noted(replace, lambda source, target: "renamed"))
    monkeypatch.setattr(os, "pwrite", noted(pwrite, lambda *_: "written"))
    path = tmp_path / "layer-001.safetensors"
    with LayerWriter(path, layout, {}) as writer:
        fill(writer, random_tensors(layout))
        writer.seal(pool, StopRequest())
        writer.publish()
    last_write = len(done) - done[::-1].index("written")
    assert done[last_write:] == [path.stat().st_ino, "renamed", tmp_path.stat().st_ino]


@pytest.mark.parametrize("size", [1000, 1024])
def test_digest_of_a_range_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Whole chunks and a part of one, with other bytes before and behind."""
    monkeypatch.setattr(writer_module, "_CHUNK", 256)
    data = np.random.default_rng(0).bytes(2000)
    (tmp_path / "data").write_bytes(data)
    with (tmp_path / "data").open("rb") as file:
        found = hash_range(file.fileno(), 100, 100 + size, StopRequest())
    assert found == hashlib.sha256(data[100 : 100 + size]).hexdigest()


def test_header_length_does_not_depend_on_checksums() -> None:
    layout = PackedLayout(2, 128, 64, "int4")
    blank = dict.fromkeys(layout.tensors(), "0" * 64)
    real = {name: f"{number:064x}" for number, name in enumerate(layout.tensors())}
    assert len(layer_header(layout, {}, blank)) == len(layer_header(layout, {}, real))
    data = sum(spec.nbytes for spec in layout.tensors().values())
    assert file_bytes(layout, {}) == len(layer_header(layout, {}, blank)) + data


def test_nothing_is_left_without_publish(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = PackedLayout(1, 64, 64, "int8")
    with LayerWriter(tmp_path / "layer-001.safetensors", layout, {}) as writer:
        assert [file.name for file in tmp_path.iterdir()] == ["layer-001.safetensors.tmp"]
        fill(writer, random_tensors(layout))
        writer.seal(pool, StopRequest())
    assert list(tmp_path.iterdir()) == []


def test_not_readable_before_seal(tmp_path: Path) -> None:
    layout = PackedLayout(1, 64, 64, "int8")
    with LayerWriter(tmp_path / "layer-001.safetensors", layout, {}) as writer:
        fill(writer, random_tensors(layout))
        with pytest.raises(Exception, match=r"[Hh]eader"):
            safe_open(writer.temporary, framework="pt")


def test_misuse(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = PackedLayout(2, 64, 64, "int8")
    tensors = random_tensors(layout)
    with LayerWriter(tmp_path / "layer-001.safetensors", layout, {}) as writer:
        with pytest.raises(RuntimeError, match="the layout says"):
            writer.write_expert("gate.codes", 0, np.zeros((4, 16, 32), np.int8))
        with pytest.raises(RuntimeError, match="the layout says"):
            writer.write_expert("gate.scales", 0, np.zeros(64, np.float64))
        writer.write_expert("gate.scales", 0, tensors["gate.scales"][0])
        with pytest.raises(KeyError):  # twice
            writer.write_expert("gate.scales", 0, tensors["gate.scales"][0])
        with pytest.raises(KeyError):  # no such expert
            writer.write_expert("gate.scales", 2, tensors["gate.scales"][0])
        with pytest.raises(RuntimeError, match="never written"):
            writer.seal(pool, StopRequest())
    assert list(tmp_path.iterdir()) == []
