"""Whatever happens to a file of source or output between runs is found and named.

The table says by what: the next run (``rerun`` goes on and mends it, ``refused`` ends with a line)
or ``--verify``, which reads every byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.command import main
from kt_kernel.files.safetensors_header import read_header
from tests.convert.helpers import directory_content

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]

SHARD, OTHER = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
LAYER, NEXT = "layer-002.safetensors", "layer-003.safetensors"
MANIFEST = "manifest.json"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """A bit, in a shard one of layer 2's, with a new time of writing, as a program would do it."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.name == SHARD:
        tensors = read_header(path).tensors
        place = next(e.begin for n, e in tensors.items() if "layers.2.mlp.experts.1." in n)
    content[place] ^= 1
    path.write_bytes(content)


def rot(path: Path) -> None:
    """The same without a trace in the file's times, as a disk would do it."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path)
    os.utime(path, ns=times)


def delete(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    other = path.with_name({SHARD: OTHER, LAYER: NEXT}[path.name])
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


#: (file, what is done to it, what the next run does); --verify names the file in every row
TABLE = [
    (SHARD, truncate, "refused"),
    (SHARD, flip, "rerun"),
    (SHARD, rot, ""),
    (SHARD, delete, "refused"),
    (SHARD, swap, "refused"),
    (INDEX, truncate, "refused"),
    (INDEX, flip, "refused"),
    (INDEX, rot, "refused"),
    (INDEX, delete, "refused"),
    (CONFIG, truncate, "refused"),
    (CONFIG, flip, "refused"),
    (CONFIG, rot, "refused"),
    (CONFIG, delete, "refused"),
    (LAYER, truncate, "rerun"),
    (LAYER, flip, ""),
    (LAYER, rot, ""),
    (LAYER, delete, "rerun"),
    (LAYER, swap, "refused"),
    (MANIFEST, truncate, "made again"),
    (MANIFEST, flip, "made again"),
    (MANIFEST, delete, "made again"),
]


@pytest.mark.parametrize(
    ("name", "damage", "outcome"),
    TABLE,
    ids=[f"{damage.__name__}-{name.split('-of')[0]}" for name, damage, _ in TABLE],
)
def test_damage_is_found_and_named(
    source: Path,
    converted: Path,
    tmp_path: Path,
    convert: Convert,
    convert_fails: ConvertFails,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    outcome: str,
) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    output = Path(shutil.copytree(converted, tmp_path / "out"))
    victim = (model if (model / name).exists() else output) / name
    damage(victim)
    before = directory_content(output)

    assert name in _verify_fails(model, output, capsys)
    assert directory_content(output) == before  # --verify changes nothing

    if outcome == "refused":
        line = convert_fails(model, output)
        assert name in line
        assert directory_content(output) == before
        return
    lines = convert(model, output)
    again = [line for line in lines if "converting layer" in line]
    assert bool(again) == (outcome == "rerun"), lines
    assert all(str(victim) in line for line in again)
    if outcome == "rerun" and name == SHARD:
        # Only the bytes of one matrix differ: one layer is made again, from the new bytes.
        assert len(again) == 1
        changed = {n for n, data in directory_content(output).items() if data != before[n]}
        assert len(changed) == 2
        assert MANIFEST in changed
        convert(model, output, "--verify")
    elif outcome:
        assert directory_content(output) == directory_content(converted)


def _verify_fails(model: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Everything that ``--verify`` says; its exit code must be 2."""
    capsys.readouterr()
    code = main(["--input-path", str(model), "--output", str(output), "--verify"])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.count("\n") == 1
    return captured.out + captured.err


def test_verify_of_a_sound_output(source: Path, converted: Path, convert: Convert) -> None:
    lines = convert(source, converted, "--verify")
    assert [line.partition(", error")[0] for line in lines[:3]] == [
        f"layer {idx}: ok, 46.1 kB, source unchanged" for idx in (1, 2, 3)
    ]
    assert lines[3].startswith(f"verified: {converted}, 3 layers")


def test_verify_names_the_tensor_without_the_source(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(converted, tmp_path / "out"))
    assert main(["--output", str(output), "--verify"]) == 0
    rot(output / LAYER)
    capsys.readouterr()
    assert main(["--output", str(output), "--verify"]) == 2
    captured = capsys.readouterr()
    assert f"layer 2: BAD: {output / LAYER}: tensor up.codes has changed" in captured.out
    assert "1 of 3 layers" in captured.err


def test_verify_of_an_unfinished_output(
    source: Path, tmp_path: Path, convert: Convert, convert_fails: ConvertFails
) -> None:
    output = tmp_path / "out"
    convert(source, output, "--layers", "1-2")
    assert "1 of 3 layers" in convert_fails(source, output, "--verify")
    convert(source, output, "--layers", "1-2", "--verify")
    assert "does not exist" in convert_fails(source, tmp_path / "nothing", "--verify")


def test_a_shard_that_was_written_again_alike_is_read_once(
    source: Path, tmp_path: Path, converted: Path, convert: Convert
) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    output = Path(shutil.copytree(converted, tmp_path / "out"))
    (model / SHARD).touch()
    lines = convert(model, output)
    assert not [line for line in lines if "converting layer" in line]
    assert directory_content(output) == directory_content(converted)
    newest = max(file.stat().st_mtime_ns for file in model.iterdir())
    layers = list(output.glob("layer-*"))
    assert all(file.stat().st_mtime_ns >= newest for file in layers)


def test_without_manifest_too_a_changed_shard_is_found(
    source: Path, converted: Path, tmp_path: Path, convert: Convert
) -> None:
    """The layer file itself says what it was made from; its sample of experts is not enough."""
    model = Path(shutil.copytree(source, tmp_path / "model"))
    output = Path(shutil.copytree(converted, tmp_path / "out"))
    (output / MANIFEST).unlink()
    flip(model / SHARD)
    lines = convert(model, output)
    again = [line for line in lines if "converting layer" in line]
    assert len(again) == 1
    assert SHARD in again[0]
