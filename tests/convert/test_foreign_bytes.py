"""Damage of any kind to any file that a conversion reads: it goes on or ends with one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.command import main
from convert.loss_report import Cost, make_report, summary
from convert.manifest import Manifest, changed_files
from convert.manifest_file import read_description, read_layers, read_manifest
from convert.pipeline import identify
from convert.source.checkpoint import Checkpoint
from convert.source.experts import ExpertSource
from kt_kernel.errors import UserError
from tests.convert.fake_checkpoint import INDEX, fake_checkpoint
from tests.convert.helpers import convert_argv, directory_content
from tests.convert.source.test_formats import to_int4
from tests.mutations import (
    EXAMPLES,
    damaged_bytes,
    damaged_header,
    damaged_json,
    fuzz,
    odd_files,
    put,
)

CONFIG, MARKER, MANIFEST = "config.json", ".kt-download.json", "manifest.json"
SHARD, LAYER, LOCK = "model-00002-of-00003.safetensors", "layer-002.safetensors", ".convert.lock"


def linked(folder: Path, copy: Path) -> Path:
    """A copy of a folder; its files are the same ones until one is replaced."""
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(folder, copy, copy_function=os.link))


def run(source: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> int:
    """A conversion's exit code, which is 0, or 2 with one line."""
    capsys.readouterr()
    code = main(convert_argv(source, output, *more))
    captured = capsys.readouterr()
    assert code in (0, 2), captured
    assert captured.err.count("\n") == (code == 2)
    assert captured.err.startswith("error: " if code else "")
    assert "\x1b" not in captured.out + captured.err
    return code


@pytest.fixture(scope="module")
def int4_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in compressed-tensors' int4."""
    fake = fake_checkpoint("bf16", num_layers=2)
    to_int4(fake, 64)
    return fake.write(tmp_path_factory.mktemp("int4") / "model")


@fuzz()
@given(data=st.data())
def test_damaged_source(
    data: st.DataObject,
    source: Path,
    int4_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = data.draw(st.sampled_from([source, source, int4_source]))
    model = linked(chosen, tmp_path / "model")
    name = data.draw(st.sampled_from([CONFIG, CONFIG, INDEX, SHARD, MARKER]))
    content = b'{"repo_id": "a/b", "revision": "c", "complete": true}'
    content = (chosen / name).read_bytes() if name != MARKER else content
    damaged = (
        damaged_header(content)
        if name == SHARD
        else st.one_of(damaged_json(content), damaged_json(content), damaged_bytes(content))
    )
    put(model / name, data.draw(damaged))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run(model, tmp_path / "out", capsys, "--input-type", "auto")


@fuzz(EXAMPLES // 2)
@given(data=st.data())
def test_damaged_output(
    data: st.DataObject,
    source: Path,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Damage to what the conversion wrote is mended, or named and left as it is."""
    output = linked(converted, tmp_path / "out")
    name = data.draw(st.sampled_from([LAYER, LAYER, MANIFEST]))
    content = (converted / name).read_bytes()
    if name == MANIFEST:
        damaged = st.one_of(damaged_json(content), damaged_bytes(content))
    else:
        damaged = damaged_header(content)
        if data.draw(st.booleans()):
            (output / MANIFEST).unlink()
    put(output / name, data.draw(damaged))
    before = directory_content(output)
    if run(source, output, capsys) == 0:
        # With a manifest, a file's data and the metadata that nobody asks for are taken on trust.
        found = directory_content(output)
        trusted = {name} if found.get(MANIFEST) == before.get(MANIFEST) else set()
        whole = directory_content(converted)
        assert {n: found[n] for n in whole if n not in trusted} == {
            n: whole[n] for n in whole if n not in trusted
        }
    else:
        assert directory_content(output) == before
    run(source, output, capsys, "--verify")


@pytest.mark.parametrize("key", ["format", "source_fingerprint", "tensor_sha256", "source_sha256"])
def test_a_byte_of_metadata_without_a_manifest(
    source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """The layer is made again: there is nothing in the file that would be lost."""
    output = linked(converted, tmp_path / "out")
    (output / MANIFEST).unlink()
    content = bytearray((converted / LAYER).read_bytes())
    content[content.index(f'"{key}":"'.encode()) + len(key) + 5] ^= 1
    put(output / LAYER, bytes(content))
    assert run(source, output, capsys) == 0
    assert directory_content(output) == directory_content(converted)


@fuzz(4 * EXAMPLES)
@given(data=st.data())
def test_damaged_manifest(
    data: st.DataObject, source: Path, converted: Path, tmp_path: Path
) -> None:
    """Without its digest, as older ones are: nothing but the fields' types is left to go by."""
    content = json.loads((converted / MANIFEST).read_bytes())
    del content["manifest_sha256"]
    path = put(tmp_path / MANIFEST, data.draw(damaged_json(json.dumps(content).encode())))
    with contextlib.suppress(UserError):
        found = read_manifest(path)
        description, layers = read_description(found), read_layers(found)
        with Checkpoint(source) as checkpoint:
            identity = identify(ExpertSource(checkpoint, "fp8"), "int4", tmp_path)
            changed_files(description, checkpoint.file_digests())
        manifest = Manifest(tmp_path, identity)
        manifest.layers = layers
        summary(make_report(manifest, Cost(1, 1, 1.0)))
        manifest.load()


@pytest.mark.parametrize("kind", odd_files())
def test_odd_files(
    source: Path,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """A directory, a pipe, a loop of links ... in the place of each file."""
    for name in (CONFIG, INDEX, SHARD):
        model = linked(source, tmp_path / "model")
        (model / name).unlink()
        odd_files()[kind](model / name)
        assert run(model, tmp_path / "none", capsys) == 2
        assert not (tmp_path / "none").exists()
    for name in (LAYER, MANIFEST, LOCK):
        output = linked(converted, tmp_path / "out")
        (output / name).unlink(missing_ok=True)
        odd_files()[kind](output / name)
        if run(source, output, capsys) == 0 and name != LOCK:
            assert directory_content(output) == directory_content(converted)


@pytest.mark.parametrize("name", [f"{LAYER}.tmp", f"{MANIFEST}.tmp", LOCK])
def test_a_link_or_pipe_where_a_file_is_written(
    source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What a link leads to stays as it is, and nobody waits for a pipe's reader."""
    victim = put(tmp_path / "victim", b"mine")
    for make in (lambda path: path.symlink_to(victim), os.mkfifo):
        output = linked(converted, tmp_path / "out")
        (output / LAYER).unlink()
        make(output / name)
        # With others in the directory, what they are writing must be left alone.
        code = run(source, output, capsys, "--layers", "1-3")
        assert code == 2 or (name, make) == (LOCK, os.mkfifo)  # which locks like any file
        assert victim.read_bytes() == b"mine"
        (output / name).unlink(missing_ok=True)
        assert run(source, output, capsys) == 0
        assert directory_content(output) == directory_content(converted)


@pytest.mark.parametrize("kind", odd_files())
def test_odd_directories(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """In the place of the source and of the output; an empty directory is a fine output."""
    odd_files()[kind](tmp_path / "odd")
    assert run(tmp_path / "odd", tmp_path / "out", capsys) == 2
    assert run(source, tmp_path / "odd", capsys) == (0 if kind == "directory" else 2)
    assert run(source, tmp_path / "odd" / "below", capsys) == (0 if kind == "directory" else 2)


def test_null_is_no_field_where_there_is_a_default(
    int4_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers and compressed-tensors, which write and read it so."""
    model = linked(int4_source, tmp_path / "model")
    config = json.loads((model / CONFIG).read_bytes())
    config |= dict.fromkeys(("moe_layer_freq", "mlp_only_layers", "model_type", "num_experts"))
    scheme = config["quantization_config"]
    scheme["weight_block_size"] = None
    (group,) = scheme["config_groups"].values()
    scheme["format"], group["format"] = scheme.get("format") or group["format"], None
    group["weights"] |= dict.fromkeys(("type", "symmetric", "strategy", "actorder"))
    put(model / CONFIG, json.dumps(config).encode())
    index = json.loads((model / INDEX).read_bytes())
    put(model / INDEX, json.dumps({**index, "metadata": None}).encode())
    put(model / MARKER, b'{"repo_id": null, "revision": null, "complete": null}')
    assert run(model, tmp_path / "out", capsys, "--input-type", "int4") == 0
    group["weights"] |= {"actorder": False}
    put(model / CONFIG, json.dumps(config).encode())
    assert run(model, tmp_path / "out2", capsys, "--input-type", "int4") == 0
