"""What a conversion tells the program that runs it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert.command import main
from convert.read_back import read_packed
from convert.source.checkpoint import Checkpoint
from convert.source.experts import ExpertProjection, ExpertSource
from kt_kernel.packed import PackedLayout
from tests.convert.helpers import REPOSITORY, convert_argv

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]


def test_layers_are_told_as_they_are_finished(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    failures: list[str] = []

    def on_layers(finished: int, total: int) -> None:
        # What is told is on the disk: a reader may rely on it.
        assert len(list((tmp_path / "out").glob("layer-*.safetensors"))) == finished
        told.append((finished, total))

    argv = convert_argv(source, tmp_path / "out")
    assert main(argv, on_layers, failures.append) == 0
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    sorted((tmp_path / "out").glob("layer-*.safetensors"))[1].unlink()
    told.clear()
    assert main(argv, on_layers, failures.append) == 0
    assert told == [(2, 3), (3, 3)]
    assert failures == []


def test_the_reason_of_a_failure_is_told(tmp_path: Path) -> None:
    failures: list[str] = []
    argv = convert_argv(tmp_path / "no", tmp_path / "out")
    assert main(argv, on_failure=failures.append) == 2
    assert failures == [f"--input-path {tmp_path / 'no'} does not exist"]
    assert main(["--wrong"], on_failure=failures.append) == 2
    assert "--help lists the flags" in failures[1]


def test_a_terminal_gets_a_bar_and_the_lines_stay_whole(source: Path, tmp_path: Path) -> None:
    """On a real pseudo-terminal; the bar counts matrices and the lines go to stdout as ever."""
    argv = [sys.executable, "-m", "convert", *convert_argv(source, tmp_path / "out")]
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    out = process.communicate(timeout=60)[0].decode().splitlines()
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.returncode == 0
    assert b"27/27" in shown
    assert b"matrices/s" in shown
    assert [line.split(":")[0] for line in out if line.startswith("layer")] == [
        "layer 1",
        "layer 2",
        "layer 3",
    ]


def test_report_of_a_conversion(
    source: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers are in it, those of an earlier run too, and the ratios are those of the files."""
    output, path = tmp_path / "out", tmp_path / "report.json"
    convert(source, output, "--layers", "1-2")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = convert(source, output, "--report", str(path))
    assert "no plot: matplotlib is missing" in lines[-2]
    assert lines[-3].startswith(
        "signal to noise, up to 3 of 3 experts of each layer measured: gate 2"
    )
    report = json.loads(path.read_bytes())
    assert report["layers"] == report["layers_in_all"] == 3
    assert report["this_run"]["layers"] == 1
    assert report["bytes"] == sum(f.stat().st_size for f in output.glob("layer-*"))
    assert report["snr_db_by_layer"].keys() == {"1", "2", "3"}
    ratios = [row["snr_db"] for row in report["worst"]]
    assert len(ratios) == 10
    assert ratios == sorted(ratios)
    # Measured here once more, from the file, for the worst.
    name = report["worst"][0]["tensor"]
    layer, expert, projection = re.findall(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)_proj", name)[0]
    item = ExpertProjection(int(layer), int(expert), projection)
    layout = PackedLayout(3, 128, 64, "int4")
    packed = read_packed(output / f"layer-00{layer}.safetensors", layout, item)
    with Checkpoint(source) as checkpoint:
        exact = ExpertSource(checkpoint, "fp8").weights(item)
    noise = np.square(packed - exact, dtype=np.float64).sum()
    signal = np.square(exact, dtype=np.float64).sum()
    assert ratios[0] == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/report.json", "no does not exist"), ("report.txt", "ends in .json")],
)
def test_report_that_cannot_be_written_is_refused_first(
    source: Path, tmp_path: Path, convert_fails: ConvertFails, name: str, message: str
) -> None:
    line = convert_fails(source, tmp_path / "out", "--report", str(tmp_path / name))
    assert message in line
    assert not (tmp_path / "out").exists()
