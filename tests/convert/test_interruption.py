"""kill -9 at any moment, then the same command again: the same bytes, finished work not redone."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert import quantize
from convert.command import main
from tests.convert.fake_checkpoint import fake_checkpoint
from tests.convert.forked_conversion import convert_in_fork
from tests.convert.helpers import convert_argv, directory_content

Start = Callable[..., subprocess.Popen[str]]


def finished_layers(output: Path) -> dict[str, tuple[int, int]]:
    """Layer files under their final names -> (inode, time of the last write)."""
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in output.glob("layer-*.safetensors")
    }


def test_kill_before_every_file_operation(tmp_path: Path) -> None:
    """Every point in the order of writes, flushes and renames, one after the other."""
    source = fake_checkpoint(num_experts=2, num_layers=3).write(tmp_path / "model")
    whole = tmp_path / "whole"
    ended_by, operations = convert_in_fork(0, convert_argv(source, whole))
    assert ended_by == 0
    expected = directory_content(whole)
    assert operations > 60, "the driver does not see the operations"
    states = set()
    for kill_at in range(1, operations + 1):
        output = tmp_path / f"killed-{kill_at}"
        assert convert_in_fork(kill_at, convert_argv(source, output))[0] == signal.SIGKILL
        finished = finished_layers(output) if output.exists() else {}
        states.add(tuple(sorted(file.name for file in output.iterdir()) if output.exists() else ()))
        assert convert_in_fork(0, convert_argv(source, output))[0] == 0
        assert directory_content(output) == expected, f"killed before operation {kill_at}"
        after = finished_layers(output)
        assert {name: after[name] for name in finished} == finished, f"redone after {kill_at}"
    # The kills did hit different states: nothing yet, temporaries, renamed but not recorded, done.
    assert len(states) >= 6, states


def test_kill_again_and_again(tmp_path: Path) -> None:
    """A conversion that is killed at a later operation each time gets to its end."""
    source = fake_checkpoint(num_experts=2, num_layers=3).write(tmp_path / "model")
    assert convert_in_fork(0, convert_argv(source, tmp_path / "whole"))[0] == 0
    output = tmp_path / "out"
    kill_at = 1
    while convert_in_fork(kill_at, convert_argv(source, output))[0] == signal.SIGKILL:
        kill_at += 3
        assert kill_at < 500
    assert directory_content(output) == directory_content(tmp_path / "whole")


@pytest.fixture(scope="module")
def larger_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes the real command long enough to be killed at many moments."""
    fake = fake_checkpoint(hidden_size=512, intermediate_size=256, num_experts=4, num_layers=5)
    return fake.write(tmp_path_factory.mktemp("larger") / "model")


def test_kill_the_real_command_at_random_moments(
    larger_source: Path, tmp_path: Path, start_convert: Start
) -> None:
    process = start_convert(*convert_argv(larger_source, tmp_path / "whole"))
    out, err = process.communicate(timeout=120)
    assert err == ""
    layer = re.search(r" in (\S+) s, ", out)
    assert layer is not None
    layer_seconds = float(layer[1])
    rng = random.Random(20251123)
    output = tmp_path / "out"
    kills = 0
    for layer_idx in (1, 2, 3, 4):
        process = start_convert(*convert_argv(larger_source, output))
        # Wait for the work and not by the clock: how long a start takes depends on the host.
        while process.poll() is None and not list(output.glob(f"layer-{layer_idx:03d}.*")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, layer_seconds))
        before = finished_layers(output)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        after = finished_layers(output)
        assert {name: after[name] for name in before} == before
    process = start_convert(*convert_argv(larger_source, output))
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert kills >= 1
    assert directory_content(output) == directory_content(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(
    source: Path,
    converted: Path,
    tmp_path: Path,
    convert: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    signum: signal.Signals,
) -> None:
    """The signal comes in the middle of the second layer, while the main thread waits."""
    output = tmp_path / "out"
    original = quantize.convert_projection
    calls = itertools.count(1)

    def signalling(*args: Any) -> None:
        if next(calls) == 9 + 4:  # 3 experts x 3 projections per layer
            os.kill(os.getpid(), signum)
        original(*args)

    monkeypatch.setattr(quantize, "convert_projection", signalling)
    handlers = [signal.getsignal(num) for num in (signal.SIGINT, signal.SIGTERM)]
    assert main(convert_argv(source, output)) == 128 + signum
    monkeypatch.undo()
    assert [signal.getsignal(num) for num in (signal.SIGINT, signal.SIGTERM)] == handlers
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"interrupted by {signum.name}: 1 of 3 layers are finished and kept")
    names = sorted(file.name for file in output.iterdir())
    assert names == ["layer-001.safetensors", "manifest.json"]
    finished = finished_layers(output)
    convert(source, output)
    assert directory_content(output) == directory_content(converted)
    assert finished.items() <= finished_layers(output).items()
