"""Checkpoints of the other families that SGLang serves with KT, and of other number formats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.source.checkpoint import Checkpoint
from convert.source.decode import decode_int4
from convert.source.experts import ExpertSource
from tests.convert.fake_checkpoint import FakeCheckpoint, fake_checkpoint

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]

GATE = "model.layers.2.mlp.experts.1.gate_proj.weight"


def pack_to_int32(values: torch.Tensor, bits: int) -> torch.Tensor:
    # Imported here, since it imports transformers: 10 s that collecting the tests would take.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: torch.Tensor = pack_to_int32(values, bits)
    return packed


def to_int4(fake: FakeCheckpoint, group: int, scale_dtype: str = "BF16") -> dict[str, np.ndarray]:
    """Make the routed experts compressed-tensors' int4; returns what they mean exactly."""
    rng = np.random.default_rng(group)
    exact = {}
    for name in [name for name in fake.tensors if ".experts." in name and name.endswith("weight")]:
        _, (n, k), _ = fake.tensors.pop(name)
        fake.tensors.pop(f"{name}_scale_inv", None)
        values = rng.integers(-8, 8, (n, k)).astype(np.int8)
        kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[scale_dtype]
        scale = torch.from_numpy(rng.uniform(0.001, 0.01, (n, k // group))).to(kind)
        packed = pack_to_int32(torch.from_numpy(values), 4)
        spread = scale.float().numpy().repeat(group, axis=1)
        exact[name] = values.astype(np.float32) * spread
        raw = scale.view(torch.int32 if scale_dtype == "F32" else torch.int16).numpy().tobytes()
        shape = np.array([n, k], np.int64).tobytes()
        fake.tensors[f"{name}_packed"] = ("I32", tuple(packed.shape), packed.numpy().tobytes())
        fake.tensors[f"{name}_scale"] = (scale_dtype, tuple(scale.shape), raw)
        fake.tensors[f"{name}_shape"] = ("I64", (2,), shape)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "actorder": None,
    }
    fake.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return exact


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("scale_dtype", ["BF16", "F16", "F32"])
def test_int4_is_read_as_the_library_packs_it(tmp_path: Path, group: int, scale_dtype: str) -> None:
    fake = fake_checkpoint("bf16", 256, 128, num_experts=2, num_layers=3)
    exact = to_int4(fake, group, scale_dtype)
    with Checkpoint(fake.write(tmp_path / "model")) as checkpoint:
        source = ExpertSource(checkpoint, "int4")
        for item in source.items(1):
            got = source.weights(item)
            np.testing.assert_array_equal(got, exact[item.weight])


def test_int4_of_every_pair_of_values() -> None:
    values = np.array([[a, b] * 4 for a in range(-8, 8) for b in range(-8, 8)], np.int8)
    packed = pack_to_int32(torch.from_numpy(values), 4).numpy()
    scale = np.ones((256, 1), np.float32)
    np.testing.assert_array_equal(decode_int4(packed, scale, "F32"), values)


def test_int4_is_encoded_again(tmp_path: Path, convert: Convert) -> None:
    fake = fake_checkpoint("bf16", 256, 128, num_layers=3)
    to_int4(fake, 32)
    model = fake.write(tmp_path / "model")
    lines = convert(model, tmp_path / "out", "--input-type", "auto")
    assert ", int4" in lines[0]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["source"]["input_type"] == "int4"
    errors = manifest["layers"]["1"]["errors"]
    assert all(0 < error < 0.12 for error in errors.values())  # uniform values, not Gaussian
    convert(model, tmp_path / "out", "--verify")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_bits", 8, "expected 4"),
        ("symmetric", False, "expected true"),
        ("strategy", "channel", 'expected "group"'),
        ("actorder", "group", "expected null"),
        ("group_size", 48, "expected one of 32, 64, 128"),
    ],
)
def test_other_int4_schemes_are_refused(
    tmp_path: Path, convert_fails: ConvertFails, key: str, value: Any, expected: str
) -> None:
    fake = fake_checkpoint("bf16", num_layers=2)
    to_int4(fake, 64)
    fake.config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    model = fake.write(tmp_path / "model")
    line = convert_fails(model, tmp_path / "out", "--input-type", "int4")
    assert f"{model / 'config.json'}: quantization_config" in line
    assert f"{key} {json.dumps(value)}" in line
    assert expected in line


def test_a_group_that_is_null_is_none(tmp_path: Path) -> None:
    fake = fake_checkpoint("bf16")
    fake.config["quantization_config"] = {"config_groups": {"group_0": None}}
    assert Checkpoint(fake.write(tmp_path / "model")).dims.int4_scheme == {}


def test_gptq_is_named(tmp_path: Path, convert_fails: ConvertFails) -> None:
    fake = fake_checkpoint("bf16")
    for name in [name for name in fake.tensors if ".experts." in name]:
        tensor = fake.tensors.pop(name)
        fake.tensors[name.replace(".weight", ".qweight")] = tensor
    model = fake.write(tmp_path / "model")
    for input_type in ("auto", "bf16", "fp8"):
        line = convert_fails(model, tmp_path / "out", "--input-type", input_type)
        assert "gate_proj.qweight, the layout of GPTQ and AWQ" in line


def test_weights_in_two_formats_are_refused(tmp_path: Path, convert_fails: ConvertFails) -> None:
    fake = fake_checkpoint("bf16", 256, 128, num_experts=2, num_layers=3)
    plain = dict(fake.tensors)
    to_int4(fake, 32)
    fake.tensors |= plain
    model = fake.write(tmp_path / "model")
    line = convert_fails(model, tmp_path / "out", "--input-type", "auto")
    assert "weights in 2 formats: " in line
    assert all(f"({name})" in line for name in ("bf16", "int4"))
    for input_type in ("bf16", "int4"):  # neither may leave out the other's silently
        line = convert_fails(model, tmp_path / "out", "--input-type", input_type)
        assert "no tensor of that name belongs to a checkpoint of this --input-type" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp16"])
def test_auto_takes_what_the_files_hold(tmp_path: Path, convert: Convert, dtype: str) -> None:
    model = fake_checkpoint(dtype, num_layers=2).write(tmp_path / "model")
    assert convert(model, tmp_path / "a", "--input-type", "auto")[0].endswith(f", {dtype}")
    convert(model, tmp_path / "b", "--input-type", dtype)
    name = "layer-001.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def qwen(fake: FakeCheckpoint, **more: Any) -> None:
    """Turn the config into Qwen3-MoE's, whose tensors have the same names."""
    experts = fake.config["n_routed_experts"]
    for name in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq"):
        fake.config.pop(name)
    fake.config |= {"model_type": "qwen3_moe", "num_experts": experts, **more}


def drop_experts(fake: FakeCheckpoint, layers: list[int]) -> None:
    for layer in layers:
        for name in [n for n in fake.tensors if n.startswith(f"model.layers.{layer}.mlp.experts")]:
            fake.tensors.pop(name)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe"])
def test_families_with_deepseek_names(tmp_path: Path, convert: Convert, model_type: str) -> None:
    fake = fake_checkpoint("bf16", num_layers=3)
    fake.config["model_type"] = model_type
    if model_type == "glm4_moe":
        fake.config.pop("moe_layer_freq")  # GLM has none
    model = fake.write(tmp_path / "model")
    lines = convert(model, tmp_path / "out", "--input-type", "auto")
    assert f"{model_type}, 2 MoE layers of 3 experts" in lines[0]


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),  # counted from 1, not from 0 as moe_layer_freq
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}, [1, 3]),
    ],
)
def test_qwen3_moe(
    tmp_path: Path, convert: Convert, settings: dict[str, Any], layers: list[int]
) -> None:
    fake = fake_checkpoint("bf16", first_dense=0)
    qwen(fake, **settings)
    drop_experts(fake, [layer for layer in range(4) if layer not in layers])
    convert(fake.write(tmp_path / "model"), tmp_path / "out", "--input-type", "auto")
    names = sorted(file.name for file in (tmp_path / "out").glob("layer-*"))
    assert names == [f"layer-{layer:03d}.safetensors" for layer in layers]


def test_qwen_errors_name_qwen_keys(tmp_path: Path, convert_fails: ConvertFails) -> None:
    fake = fake_checkpoint("bf16", first_dense=0, num_layers=2)
    qwen(fake, num_experts=2)
    line = convert_fails(fake.write(tmp_path / "a"), tmp_path / "out", "--input-type", "bf16")
    assert "says num_experts is 2" in line
    fake.config["mlp_only_layers"] = "none"
    line = convert_fails(fake.write(tmp_path / "b"), tmp_path / "out", "--input-type", "bf16")
    assert "mlp_only_layers is 'none', expected a list" in line


def test_error_of_int4_is_that_of_its_own_values(tmp_path: Path, convert: Convert) -> None:
    """INT8 keeps int4's values nearly exactly: a wrong nibble order or scale would not."""
    fake = fake_checkpoint("bf16", 256, 128, num_layers=2)
    to_int4(fake, 128)
    model = fake.write(tmp_path / "model")
    output = tmp_path / "out"
    convert(model, output, "--input-type", "int4", "--quant-method", "int8")
    record = json.loads((output / "manifest.json").read_bytes())["layers"]["1"]
    worst = max(record["errors"].values())
    assert -20 * math.log10(worst) > 38  # dB
