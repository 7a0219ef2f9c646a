"""Resuming, locking, and output directories that hold something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convert import read_back
from convert.output import OutputDirectory
from kt_kernel.errors import UserError
from tests.convert.fake_checkpoint import fake_checkpoint
from tests.convert.helpers import REPOSITORY, directory_content

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]


@pytest.fixture
def output(converted: Path, tmp_path: Path) -> Path:
    """A copy of the finished conversion that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


def identities(output: Path) -> dict[str, tuple[int, int]]:
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in output.iterdir()}


def test_finished_output_is_left_alone(source: Path, output: Path, convert: Convert) -> None:
    before = identities(output)
    lines = convert(source, output)
    assert identities(output) == before
    assert not [line for line in lines if line.startswith("layer ")]
    assert "3 of 3 layers finished before" in lines[1]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied"])
def test_damaged_layer_is_named_and_redone(
    source: Path, converted: Path, output: Path, convert: Convert, damage: str
) -> None:
    victim = output / "layer-002.safetensors"
    if damage == "deleted":
        victim.unlink()
    else:
        with victim.open("r+b") as file:
            file.truncate(0 if damage == "emptied" else 5000)
    kept = identities(output)["layer-001.safetensors"]
    lines = convert(source, output)
    assert any(str(victim) in line and "converting layer 2 again" in line for line in lines)
    assert directory_content(output) == directory_content(converted)
    assert identities(output)["layer-001.safetensors"] == kept


def test_deleted_manifest_is_made_again_from_the_files(
    source: Path, converted: Path, output: Path, convert: Convert
) -> None:
    (output / "manifest.json").unlink()
    before = identities(output)
    convert(source, output)
    assert directory_content(output) == directory_content(converted)
    after = identities(output)
    assert {name: after[name] for name in before} == before


def test_without_manifest_a_flipped_bit_is_found_and_the_layer_redone(
    source: Path, converted: Path, output: Path, convert: Convert
) -> None:
    (output / "manifest.json").unlink()
    victim = output / "layer-003.safetensors"
    content = bytearray(victim.read_bytes())
    content[-5000] ^= 0x10
    victim.write_bytes(content)
    lines = convert(source, output)
    assert any(str(victim) in line and "checksum" in line for line in lines)
    assert directory_content(output) == directory_content(converted)


def test_a_layer_that_is_read_back_wrong_has_no_final_name(
    source: Path, tmp_path: Path, convert_fails: ConvertFails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object) -> None:
        raise UserError(f"{path} is wrong")

    monkeypatch.setattr(read_back, "verify_layer_file", fail)
    assert "layer-001.safetensors" in convert_fails(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/layer-*"))


def test_leftovers_of_a_killed_run_are_removed(
    source: Path, converted: Path, output: Path, convert: Convert
) -> None:
    (output / "layer-002.safetensors").rename(output / "layer-002.safetensors.tmp")
    (output / "manifest.json.tmp").write_text("{")
    (output / ".convert.lock").write_text("pid 1 on elsewhere\n")
    convert(source, output)
    assert directory_content(output) == directory_content(converted)


def test_files_of_others_are_left_alone(source: Path, output: Path, convert: Convert) -> None:
    (output / "notes.txt").write_text("mine")
    (output / "other.tmp").write_text("mine")
    (output / "lost+found").mkdir()
    convert(source, output)
    assert {"notes.txt", "other.tmp", "lost+found"} <= {file.name for file in output.iterdir()}


def test_other_method_in_the_same_directory(
    source: Path, output: Path, convert_fails: ConvertFails
) -> None:
    before = identities(output)
    line = convert_fails(source, output, "--quant-method", "int8")
    assert "int4" in line
    assert "int8" in line
    assert str(output) in line
    (output / "manifest.json").unlink()
    line = convert_fails(source, output, "--quant-method", "int8")
    assert "layer-001.safetensors" in line
    assert "holds int4 weights, --quant-method is int8" in line
    before.pop("manifest.json")
    assert identities(output) == before


def test_other_model_in_the_same_directory(
    output: Path, tmp_path: Path, convert_fails: ConvertFails
) -> None:
    fake = fake_checkpoint(num_experts=2)
    before = identities(output)
    line = convert_fails(fake.write(tmp_path / "other"), output)
    assert "another checkpoint" in line
    assert "3 experts" in line
    assert "2 experts" in line
    assert identities(output) == before


def test_changed_source_is_refused(
    source: Path, output: Path, tmp_path: Path, convert_fails: ConvertFails
) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    config["rope_theta"] = 5
    (changed / "config.json").write_text(json.dumps(config))
    assert "another checkpoint" in convert_fails(changed, output)


def test_a_layer_file_of_another_model(
    source: Path, output: Path, tmp_path: Path, convert: Convert, convert_fails: ConvertFails
) -> None:
    convert(fake_checkpoint(seed=1, num_experts=2).write(tmp_path / "other"), tmp_path / "out2")
    shutil.copy(tmp_path / "out2" / "layer-002.safetensors", output)
    before = identities(output)
    line = convert_fails(source, output)
    assert str(output / "layer-002.safetensors") in line
    assert "another checkpoint" in line
    assert identities(output) == before


def test_layers_swapped(source: Path, output: Path, convert_fails: ConvertFails) -> None:
    one, two = output / "layer-001.safetensors", output / "layer-002.safetensors"
    one.rename(output / "x")
    two.rename(one)
    (output / "x").rename(two)
    line = convert_fails(source, output)
    assert str(one) in line
    assert "layer_idx 2, this run has 1" in line


@pytest.mark.parametrize("content", ["[]", '{"format": "something else"}', '{"layers": {}}'])
def test_manifest_of_another_program(
    source: Path, output: Path, convert_fails: ConvertFails, content: str
) -> None:
    (output / "manifest.json").write_text(content)
    assert "manifest.json" in convert_fails(source, output)
    assert (output / "manifest.json").read_text() == content


def test_a_file_that_is_no_manifest_is_not_replaced_where_nothing_else_is_ours(
    source: Path, tmp_path: Path, convert_fails: ConvertFails
) -> None:
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in convert_fails(source, tmp_path)
    assert directory_content(tmp_path) == {"manifest.json": b"{"}


def test_second_converter_is_refused(
    source: Path, output: Path, convert: Convert, convert_fails: ConvertFails
) -> None:
    before = directory_content(output)
    with OutputDirectory(output):
        line = convert_fails(source, output)
    assert f"another conversion (pid {os.getpid()}" in line
    assert str(output) in line
    assert directory_content(output) == before
    convert(source, output)


def test_lock_is_free_again_when_its_holder_was_killed(
    source: Path, output: Path, convert: Convert, convert_fails: ConvertFails
) -> None:
    program = (
        "import sys, time, pathlib; from convert.output import OutputDirectory; "
        "OutputDirectory(pathlib.Path(sys.argv[1])).__enter__(); print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(output)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"  # it has the lock
        assert f"pid {holder.pid} " in convert_fails(source, output)
    finally:
        holder.kill()
        holder.communicate()
    assert (output / ".convert.lock").exists()
    convert(source, output)
    assert not (output / ".convert.lock").exists()


def test_lock_directory_made_here_is_removed_if_nothing_was_written(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".convert.lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with OutputDirectory(tmp_path / "kept"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/out: Not a directory"):
        OutputDirectory(tmp_path / "file" / "out").__enter__()
