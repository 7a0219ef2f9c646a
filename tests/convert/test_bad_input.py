"""Every mistake: exit code 2, one line that names file and tensor, nothing left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.convert.fake_checkpoint import INDEX, FakeCheckpoint, fake_checkpoint

ConvertFails = Callable[..., str]

GATE = "model.layers.2.mlp.experts.1.gate_proj.weight"
SCALE = GATE + "_scale_inv"
SHARD = "model-00002-of-00003.safetensors"


def change(fake: FakeCheckpoint, name: str, **changes: Any) -> None:
    """Replace the dtype, shape or data of a tensor."""
    dtype, shape, data = fake.tensors[name]
    fake.tensors[name] = (
        changes.get("dtype", dtype),
        changes.get("shape", shape),
        changes.get("data", data),
    )


def rename_expert(fake: FakeCheckpoint, layer: int, old: int, new: int) -> None:
    for name in list(fake.tensors):
        prefix = f"model.layers.{layer}.mlp.experts.{old}."
        if name.startswith(prefix):
            new_name = name.replace(prefix, f"model.layers.{layer}.mlp.experts.{new}.")
            fake.tensors[new_name] = fake.tensors[name]


#: name -> (change to a sound checkpoint, what the one line must contain)
BROKEN: dict[str, tuple[Callable[[FakeCheckpoint], object], list[str]]] = {
    "tensor missing": (
        lambda fake: fake.tensors.pop(GATE),
        [INDEX, GATE, "not complete"],
    ),
    "scale missing": (
        lambda fake: fake.tensors.pop(SCALE),
        [INDEX, SCALE],
    ),
    "wrong shape": (
        lambda fake: change(fake, GATE, shape=(128, 64)),
        [GATE, ".safetensors", "[128, 64]", "expected [64, 128]"],
    ),
    "wrong shape of scale": (
        lambda fake: change(fake, SCALE, shape=(2, 1), data=bytes(8)),
        [SCALE, "[2, 1]", "expected [1, 1]"],
    ),
    "wrong dtype": (
        lambda fake: change(fake, GATE, dtype="U8"),
        [GATE, "is U8", "expected F8_E4M3"],
    ),
    "wrong dtype of scale": (
        lambda fake: change(fake, SCALE, dtype="BF16", data=bytes(2)),
        [SCALE, "is BF16", "expected F32"],
    ),
    "data shorter than its shape": (
        lambda fake: change(fake, GATE, data=bytes(100)),
        [GATE, "spans 100 bytes", "expected 8192"],
    ),
    "more experts than the config says": (
        lambda fake: rename_expert(fake, 2, 0, 3),
        ["model.layers.2.mlp.experts.3.", "config.json", "n_routed_experts is 3"],
    ),
    "experts in a dense layer": (
        lambda fake: fake.config.update(first_k_dense_replace=2),
        ["model.layers.1.mlp.experts.", "layer 1 is dense"],
    ),
    "unknown part of an expert": (
        lambda fake: fake.tensors.update({GATE + "_packed": ("U8", (1,), b"0")}),
        [GATE + "_packed", "no tensor of that name"],
    ),
    "hidden size not a multiple of the block": (
        lambda fake: fake.config.update(hidden_size=120),
        ["config.json", "hidden_size is 120", "multiple of 64"],
    ),
    "intermediate size not a multiple of the block": (
        lambda fake: fake.config.update(moe_intermediate_size=96),
        ["config.json", "intermediate_size is 96", "multiple of 64"],
    ),
    "no experts in the config": (
        lambda fake: fake.config.pop("n_routed_experts"),
        ["config.json", "n_routed_experts"],
    ),
    "config with a wrong value": (
        lambda fake: fake.config.update(num_hidden_layers="four"),
        ["config.json", "num_hidden_layers", "'four'"],
    ),
    "no MoE layer": (
        lambda fake: fake.config.update(first_k_dense_replace=4),
        ["config.json", "no layer with experts"],
    ),
    "other FP8 blocks": (
        lambda fake: fake.config["quantization_config"].update(weight_block_size=[1, 32]),
        ["config.json", "weight_block_size", "[1, 32]", "expected [128, 128]"],
    ),
    "no FP8 blocks": (
        lambda fake: fake.config.pop("quantization_config"),
        ["config.json", "weight_block_size", "missing"],
    ),
    "shard outside the directory": (
        lambda fake: fake.index_changes.update({GATE: "../model.safetensors"}),
        [INDEX, GATE, "../model.safetensors"],
    ),
    "tensor not in the shard that the index names": (
        lambda fake: fake.index_changes.update({GATE: wrong_shard(fake)}),
        [GATE, "holds no tensor", ".safetensors"],
    ),
    "more layers in the config than in the file": (
        lambda fake: fake.config.update(num_hidden_layers=6),
        ["model.layers.5.mlp.experts.0", "not complete"],
    ),
}


def wrong_shard(fake: FakeCheckpoint) -> str:
    """The name of a shard that does not hold GATE."""
    right = list(fake.tensors).index(GATE) % fake.num_shards
    return f"model-{(right + 1) % fake.num_shards + 1:05d}-of-{fake.num_shards:05d}.safetensors"


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(tmp_path: Path, convert_fails: ConvertFails, case: str) -> None:
    breaking, expected = BROKEN[case]
    fake = fake_checkpoint()
    breaking(fake)
    line = convert_fails(fake.write(tmp_path / "model"), tmp_path / "out")
    for part in expected:
        assert part in line, line
    assert not (tmp_path / "out").exists()


def delete_config(model: Path) -> None:
    (model / "config.json").unlink()


def delete_shard(model: Path) -> None:
    (model / SHARD).unlink()


def delete_index(model: Path) -> None:
    (model / INDEX).unlink()


def truncate_shard(model: Path) -> None:
    with (model / SHARD).open("r+b") as file:
        file.truncate((model / SHARD).stat().st_size - 1)


def truncate_shard_in_header(model: Path) -> None:
    with (model / SHARD).open("r+b") as file:
        file.truncate(100)


def empty_shard(model: Path) -> None:
    (model / SHARD).write_bytes(b"")


def lengthen_shard(model: Path) -> None:
    with (model / SHARD).open("ab") as file:
        file.write(b"x")


def garble_shard_header(model: Path) -> None:
    with (model / SHARD).open("r+b") as file:
        file.seek(8)
        file.write(b"!!!!")


def garble_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def garble_index(model: Path) -> None:
    (model / INDEX).write_text('{"weight_map": ')


def unfinished_download(model: Path) -> None:
    (model / ".kt-download.json").write_text('{"repo_id": "a/b", "complete": false}')


def empty_index(model: Path) -> None:
    (model / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (delete_config, ["config.json does not exist"]),
        (delete_shard, [SHARD, "does not exist", INDEX]),
        (delete_index, [INDEX, "model.safetensors"]),
        (truncate_shard, [SHARD, "truncated"]),
        (truncate_shard_in_header, [SHARD, "truncated"]),
        (empty_shard, [SHARD, "truncated"]),
        (lengthen_shard, [SHARD, "download it again"]),
        (garble_shard_header, [SHARD, "not a safetensors file"]),
        (garble_config, ["config.json", "not valid JSON"]),
        (garble_index, [INDEX, "not valid JSON"]),
        (empty_index, [INDEX, "weight_map"]),
        (unfinished_download, ["not finished", ".kt-download.json"]),
    ],
)
def test_damaged_file(
    tmp_path: Path,
    convert_fails: ConvertFails,
    damage: Callable[[Path], None],
    expected: list[str],
) -> None:
    model = fake_checkpoint().write(tmp_path / "model")
    damage(model)
    line = convert_fails(model, tmp_path / "out")
    for part in expected:
        assert part in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("actual", "claimed"), [("fp8", "bf16"), ("bf16", "fp8"), ("fp16", "bf16")]
)
def test_input_type_disagrees_with_the_file(
    tmp_path: Path, convert_fails: ConvertFails, actual: str, claimed: str
) -> None:
    model = fake_checkpoint(actual).write(tmp_path / "model")
    line = convert_fails(model, tmp_path / "out", "--input-type", claimed)
    assert f"--input-type is {claimed}" in line
    assert f"use --input-type {actual}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "kind", "pattern"),
    [
        pytest.param("fp8", np.uint8, 0x7F, id="fp8-nan"),
        pytest.param("fp8", np.uint8, 0xFF, id="fp8-negative-nan"),
        pytest.param("bf16", np.uint16, 0x7FC0, id="bf16-nan"),
        pytest.param("bf16", np.uint16, 0xFF80, id="bf16-negative-inf"),
        pytest.param("fp16", np.uint16, 0x7E00, id="fp16-nan"),
        pytest.param("fp16", np.uint16, 0x7C00, id="fp16-inf"),
    ],
)
def test_values_that_cannot_be_quantised(
    tmp_path: Path,
    convert_fails: ConvertFails,
    dtype: str,
    kind: type[np.uint8 | np.uint16],
    pattern: int,
) -> None:
    fake = fake_checkpoint(dtype)
    data = np.frombuffer(fake.tensors[GATE][2], kind).copy()
    data[1234] = pattern
    change(fake, GATE, data=data.tobytes())
    output = tmp_path / "out"
    line = convert_fails(fake.write(tmp_path / "model"), output, "--input-type", dtype)
    assert GATE in line
    assert ".safetensors" in line
    # The layer before it is finished and kept; of this one nothing is left.
    assert sorted(file.name for file in output.iterdir()) == [
        "layer-001.safetensors",
        "manifest.json",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_cannot_be_used(
    tmp_path: Path, convert_fails: ConvertFails, value: float
) -> None:
    fake = fake_checkpoint()
    change(fake, SCALE, data=np.float32(value).tobytes())
    assert GATE in convert_fails(fake.write(tmp_path / "model"), tmp_path / "out")


def test_input_path_does_not_exist(tmp_path: Path, convert_fails: ConvertFails) -> None:
    line = convert_fails(tmp_path / "nowhere", tmp_path / "out")
    assert f"{tmp_path / 'nowhere'} does not exist" in line


def test_input_path_is_a_file(tmp_path: Path, convert_fails: ConvertFails) -> None:
    (tmp_path / "model").write_text("")
    assert "is not a directory" in convert_fails(tmp_path / "model", tmp_path / "out")


def test_output_is_a_file(source: Path, tmp_path: Path, convert_fails: ConvertFails) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in convert_fails(source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_is_the_input(source: Path, tmp_path: Path, convert_fails: ConvertFails) -> None:
    before = sorted(file.name for file in source.iterdir())
    (tmp_path / "link").symlink_to(source)
    assert "same directory" in convert_fails(source, tmp_path / "link")
    assert sorted(file.name for file in source.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--quant-method", "int3"], "int3"),
        (["--input-type", "fp4"], "fp4"),
        (["--cpuinfer-threads", "0"], "--cpuinfer-threads"),
        (["--cpuinfer-threads", "many"], "--cpuinfer-threads"),
        (["--threadpool-count", "-1"], "--threadpool-count"),
        (["--cpuinfer"], "--cpuinfer"),
        (["--quantmethod", "int4"], "--quantmethod"),
    ],
)
def test_wrong_flag(
    source: Path, tmp_path: Path, convert_fails: ConvertFails, flags: list[str], expected: str
) -> None:
    assert expected in convert_fails(source, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_real_command_has_no_traceback(
    source: Path, tmp_path: Path, start_convert: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "model").mkdir()
    process = start_convert(
        "--input-path", str(tmp_path / "model"), "--output", str(tmp_path / "o")
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    process = start_convert("--output", str(tmp_path / "o"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "--input-path" in err
