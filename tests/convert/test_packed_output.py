"""What is in the output: layout, values, manifest, and nothing that depends on how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from convert.read_back import read_packed, relative_error
from convert.source.experts import ExpertProjection
from kt_kernel import _ext
from kt_kernel.files.safetensors_header import DATA_ALIGNMENT, read_header
from kt_kernel.packed import METHODS, PROJECTIONS, PackedLayout, check_layer_header
from tests.convert.fake_checkpoint import fake_checkpoint
from tests.convert.helpers import directory_content, raw_bits

Convert = Callable[..., list[str]]

#: Upper bounds of the relative Frobenius error. Measured over several seeds, from bf16, fp16 and
#: FP8: Gaussian 0.0796-0.0832 (int4) and 0.0067-0.0073 (int8), Student-t(5) 0.0875-0.0923 and
#: 0.0104-0.0122.
GAUSSIAN_ERROR = {"int4": 0.085, "int4-4x8": 0.077, "int8": 0.0076}
STUDENT_ERROR = {"int4": 0.096, "int4-4x8": 0.087, "int8": 0.0128}


def test_files_are_moe_layers_only(converted: Path) -> None:
    assert sorted(file.name for file in converted.iterdir()) == [
        "layer-001.safetensors",  # 0 is dense, 4 is MTP
        "layer-002.safetensors",
        "layer-003.safetensors",
        "manifest.json",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_layer_file_has_the_layout(
    source: Path, tmp_path: Path, convert: Convert, method: str
) -> None:
    convert(source, tmp_path / "out", "--quant-method", method)
    layout = PackedLayout(3, 128, 64, method)
    for layer_idx in (1, 2, 3):
        path = tmp_path / "out" / f"layer-{layer_idx:03d}.safetensors"
        header = read_header(path)
        check_layer_header(header, layout, layer_idx)
        assert header.data_start % DATA_ALIGNMENT == 0
        assert all(entry.begin % DATA_ALIGNMENT == 0 for entry in header.tensors.values())
        assert header.file_size == max(entry.end for entry in header.tensors.values())
        assert list(header.tensors) == list(layout.tensors())
        checksums = json.loads(header.metadata["tensor_sha256"])
        content = path.read_bytes()
        for name, entry in header.tensors.items():
            data = content[entry.begin : entry.end]
            assert checksums[name] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_every_expert_opens_with_public_safetensors_at_its_place(
    source: Path, tmp_path: Path, convert: Convert, method: str
) -> None:
    """Each slice holds what the extension makes of that expert's own tensors."""
    fake = fake_checkpoint()
    convert(source, tmp_path / "out", "--quant-method", method)
    for layer_idx in (1, 2, 3):
        path = tmp_path / "out" / f"layer-{layer_idx:03d}.safetensors"
        with safe_open(path, framework="pt") as file:
            if METHODS[method].block_k:
                np.testing.assert_array_equal(file.get_tensor("tables"), _ext.int4_tables(method))
            for expert in range(3):
                for projection in PROJECTIONS:
                    name = f"model.layers.{layer_idx}.mlp.experts.{expert}.{projection}_proj.weight"
                    _, shape, data = fake.tensors[name]
                    _, scale_shape, scale_data = fake.tensors[name + "_scale_inv"]
                    parts = _ext.quantize_projection(
                        np.frombuffer(data, np.uint8).reshape(shape),
                        "fp8_e4m3",
                        np.frombuffer(scale_data, np.float32).reshape(scale_shape),
                        method,
                    )
                    assert {f"{projection}.{part}" for part in parts} == {
                        key
                        for key in PackedLayout(3, 128, 64, method).tensors()
                        if key.startswith(projection + ".")
                    }
                    for part, values in parts.items():
                        stored = raw_bits(file.get_tensor(f"{projection}.{part}")[expert])
                        assert stored.tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distribution", ["gaussian", "student"])
def test_error_against_source(
    tmp_path: Path, convert: Convert, dtype: str, method: str, distribution: str
) -> None:
    def values(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        if distribution == "gaussian":
            return rng.standard_normal(shape) * 0.02
        return rng.standard_t(5, shape) * 0.02

    # 320 and 192: the last FP8 block of both dimensions is partial.
    fake = fake_checkpoint(dtype, 320, 192, num_experts=2, num_layers=2, values=values)
    convert(
        fake.write(tmp_path / "model"),
        tmp_path / "out",
        *("--input-type", dtype, "--quant-method", method),
    )
    layout = PackedLayout(2, 320, 192, method)
    bound = (GAUSSIAN_ERROR if distribution == "gaussian" else STUDENT_ERROR)[method]
    for expert in range(2):
        for projection in PROJECTIONS:
            item = ExpertProjection(1, expert, projection)
            got = read_packed(tmp_path / "out" / "layer-001.safetensors", layout, item)
            error = relative_error(got, fake.reference[item.weight])
            assert 0.8 * bound < error < bound, (item, error)


def test_zero_weights_stay_zero(tmp_path: Path, convert: Convert) -> None:
    fake = fake_checkpoint("bf16", num_layers=2, values=lambda _, shape: np.zeros(shape))
    for method in METHODS:
        convert(
            fake.write(tmp_path / f"model-{method}"),
            tmp_path / method,
            *("--input-type", "bf16", "--quant-method", method),
        )
        got = read_packed(
            tmp_path / method / "layer-001.safetensors",
            PackedLayout(3, 128, 64, method),
            ExpertProjection(1, 1, "down"),
        )
        assert not got.any()


@pytest.mark.parametrize("threads", ["1", "2", "5"])
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_bytes_do_not_depend_on_threads_or_nodes(
    source: Path, converted: Path, tmp_path: Path, convert: Convert, threads: str, nodes: str
) -> None:
    convert(
        source,
        tmp_path / "out",
        *("--cpuinfer-threads", threads, "--threadpool-count", nodes, "--no-merge-safetensor"),
    )
    assert directory_content(tmp_path / "out") == directory_content(converted)


def test_bytes_do_not_depend_on_how_the_source_is_sharded_but_for_the_fingerprint(
    converted: Path, tmp_path: Path, convert: Convert
) -> None:
    fake = fake_checkpoint()
    fake.num_shards = 7
    convert(fake.write(tmp_path / "model"), tmp_path / "out")
    for layer_idx in (1, 2, 3):
        name = f"layer-{layer_idx:03d}.safetensors"
        ours, theirs = read_header(tmp_path / "out" / name), read_header(converted / name)
        assert ours.metadata["source_fingerprint"] != theirs.metadata["source_fingerprint"]
        assert ours.metadata["tensor_sha256"] == theirs.metadata["tensor_sha256"]


def test_single_file_checkpoint(converted: Path, tmp_path: Path, convert: Convert) -> None:
    fake = fake_checkpoint()
    fake.num_shards = 1
    model = fake.write(tmp_path / "model")
    (model / "model.safetensors.index.json").unlink()
    (model / "model-00001-of-00001.safetensors").rename(model / "model.safetensors")
    convert(model, tmp_path / "out")
    ours = read_header(tmp_path / "out" / "layer-002.safetensors")
    theirs = read_header(converted / "layer-002.safetensors")
    assert ours.metadata["tensor_sha256"] == theirs.metadata["tensor_sha256"]


def test_moe_layer_freq(tmp_path: Path, convert: Convert) -> None:
    fake = fake_checkpoint()
    fake.config["moe_layer_freq"] = 2
    for name in list(fake.tensors):
        if name.startswith(("model.layers.1.mlp.experts.", "model.layers.3.mlp.experts.")):
            del fake.tensors[name]
    convert(fake.write(tmp_path / "model"), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "layer-002.safetensors",
        "manifest.json",
    ]


def test_manifest(source: Path, converted: Path) -> None:
    manifest = json.loads((converted / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["format"] == "kt-kernel-packed"
    assert manifest["method"] == "int4"
    assert manifest["model"] == {
        "model_type": "deepseek_v32",
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_experts": 3,
        "moe_layers": [1, 2, 3],
    }
    assert list(manifest["layers"]) == ["1", "2", "3"]
    for record in manifest["layers"].values():
        content = (converted / record["file"]).read_bytes()
        assert record["bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        header = read_header(converted / record["file"])
        assert header.metadata["source_fingerprint"] == manifest["source"]["fingerprint"]


def test_download_marker_names_the_revision(tmp_path: Path, convert: Convert) -> None:
    model = fake_checkpoint().write(tmp_path / "model")
    marker = {"repo_id": "deepseek-ai/DeepSeek-V3.2-tiny", "revision": "0123abcd"}
    (model / ".kt-download.json").write_text(json.dumps({**marker, "complete": True}))
    convert(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert marker.items() <= manifest["source"].items()
    header = read_header(tmp_path / "out" / "layer-001.safetensors")
    assert header.metadata["source_revision"] == "0123abcd"


def test_progress_lines(source: Path, tmp_path: Path, convert: Convert) -> None:
    lines = convert(source, tmp_path / "out")
    layers = [line for line in lines if line.startswith("layer ")]
    assert [line.split(",")[0] for line in layers] == [
        "layer 1: 1 of 3",
        "layer 2: 2 of 3",
        "layer 3: 3 of 3",
    ]
    assert all("GB/s" in line and "weights/s" in line and "ETA" in line for line in layers)
    assert lines[-1].startswith("done: ")
    assert "3 files" in lines[-1]
    assert "bits/weight" in lines[-1]
