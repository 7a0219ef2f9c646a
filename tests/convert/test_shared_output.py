"""``--layers``: several processes convert parts of a checkpoint into one directory."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.output import OutputDirectory
from tests.convert.helpers import convert_argv, directory_content

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]
Start = Callable[..., subprocess.Popen[str]]


def test_parts_make_the_whole(
    source: Path, converted: Path, tmp_path: Path, convert: Convert
) -> None:
    output = tmp_path / "out"
    lines = convert(source, output, "--layers", "2-3")
    assert lines[-1] == "not converted yet: 1 layers, 1"
    assert json.loads((output / "manifest.json").read_bytes())["complete"] is False
    # More processes than layers: one has none.
    assert convert(source, output, "--layers", "4/4")[-1] == lines[-1]
    assert convert(source, output, "--layers", "1/3")[-1].startswith("done: ")
    assert directory_content(output) == directory_content(converted)


@pytest.mark.parametrize("kill", [False, True])
def test_two_processes_with_the_same_layers(
    source: Path, converted: Path, tmp_path: Path, start_convert: Start, kill: bool
) -> None:
    """Both end when all is done; what one that is killed leaves behind, the other finishes."""
    output = tmp_path / "out"
    argv = convert_argv(source, output, "--layers", "1-3")
    if kill:
        # Stopped where it has a layer, so that the other waits for it; killed while that waits.
        victim = start_convert(*argv)
        while not list(output.glob("layer-*")):
            assert victim.poll() is None
            time.sleep(0.001)
        victim.send_signal(signal.SIGSTOP)
        other = start_convert(*argv)
        time.sleep(1)
        victim.kill()
        victim.communicate()
    else:
        other, second = start_convert(*argv), start_convert(*argv)
        assert second.communicate(timeout=60)[1] == ""
        assert second.returncode == 0
    assert other.communicate(timeout=60)[1] == ""
    assert other.returncode == 0
    assert directory_content(output) == directory_content(converted)


def test_a_layer_that_another_has_is_waited_for(
    source: Path, converted: Path, tmp_path: Path, start_convert: Start
) -> None:
    output = tmp_path / "out"
    with OutputDirectory(output, shared=True) as other:
        with other.layer_lock(2) as free:
            assert free
            process = start_convert(*convert_argv(source, output, "--layers", "1-3"))
            assert process.stdout is not None
            lines: list[str] = []
            while not any("waiting" in line for line in lines):
                lines.append(process.stdout.readline())
                assert lines[-1]
            assert "another conversion has layers 2: waiting for them\n" in lines
            assert not (output / "layer-002.safetensors").exists()
            assert (output / "layer-003.safetensors").exists()
            assert process.poll() is None
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    assert directory_content(output) == directory_content(converted)


def test_sharing_and_having_alone_exclude_each_other(
    source: Path, tmp_path: Path, convert: Convert, convert_fails: ConvertFails
) -> None:
    output = tmp_path / "out"
    with OutputDirectory(output, shared=True):
        assert "another conversion" in convert_fails(source, output)
        convert(source, output, "--layers", "1")
    with OutputDirectory(output):
        assert "another conversion" in convert_fails(source, output, "--layers", "2")


def test_temporaries_of_others_are_left_alone(
    source: Path, tmp_path: Path, convert: Convert
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for layer_idx in (1, 3):
        (output / f"layer-00{layer_idx}.safetensors.tmp").write_text("half")
    convert(source, output, "--layers", "1-2")
    assert [file.name for file in output.glob("*.tmp")] == ["layer-003.safetensors.tmp"]


def test_a_layer_recorded_by_another_meanwhile_is_kept(
    source: Path, converted: Path, tmp_path: Path, start_convert: Start, convert: Convert
) -> None:
    """A process writes the manifest that it read merged with what is there by then."""
    output = tmp_path / "out"
    with OutputDirectory(output, shared=True) as other, other.layer_lock(1) as free:
        assert free
        process = start_convert(*convert_argv(source, output, "--layers", "1-2"))
        while not (output / "manifest.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        convert(source, output, "--layers", "3")
        layers = json.loads((output / "manifest.json").read_bytes())["layers"]
        assert {"2", "3"} <= layers.keys()
    assert process.communicate(timeout=60)[1] == ""
    assert directory_content(output) == directory_content(converted)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("7-9", "--layers 7-9 holds no layer with experts: this model has them in layers 1-3"),
        ("3-1", "argument --layers: is '3-1', expected the smaller number first"),
        ("x", "argument --layers: is 'x', expected A-B or A"),
        ("1-", "argument --layers: is '1-', expected A-B or A"),
    ],
)
def test_wrong_layers(
    source: Path, tmp_path: Path, convert_fails: ConvertFails, layers: str, message: str
) -> None:
    line = convert_fails(source, tmp_path / "out", "--layers", layers)
    assert re.search(re.escape(message), line), line
