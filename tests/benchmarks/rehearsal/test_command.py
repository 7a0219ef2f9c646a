"""The whole command with a server that only pretends; nothing is left, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import limits
from benchmarks.rehearsal import __main__ as rehearsal
from benchmarks.rehearsal import checkpoint, packed_layers, plan, result, variant
from benchmarks.rehearsal.workspace import PREFIX, workspace, workspaces
from benchmarks.server import REPOSITORY
from tests.benchmarks.rehearsal import small

SMALL = [sys.executable, "-m", "tests.benchmarks.rehearsal.small"]


def command(kind: str, folder: Path, *more: str) -> list[str]:
    # Whatever else runs on the machine: V3.2's own sizes are planned with.
    options = ["--cpu", "--memory", "64", "--rounds", "1", "--folder", str(folder)]
    return [*SMALL, kind, *options, *more]


def test_it_measures_fits_answers_and_cleans_up(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    output = tmp_path / "new" / "r.json"
    done = subprocess.run(
        command(
            "FAKE",
            files,
            "--layers",
            "1,2",
            "--check",
            "3",
            "--soak",
            "0.03",
            "--interference",
            "--json",
            str(output),
        ),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(files.iterdir()) == []
    found = json.loads(output.read_text())
    assert [server["layers"] for server in found["servers"]] == [1, 2]
    first = found["servers"][0]
    # What the prompts cost is not in the steps: one call of a millisecond and 8 experts each.
    assert first["decode"]["2"]["experts"] == 16
    assert first["decode"]["1"]["workers"] == pytest.approx(1e-3)
    assert first["load GB/s"] == [11.6]
    assert found["fits"]["decode"]["1"]["layers"] == 58
    assert all("soak" not in server for server in found["servers"])
    # The third takes no part in the line, and is the largest.
    assert found["check"]["layers"] == found["line_check"]["layers"] == 3
    assert set(found["line_check"]["decode"]) == {"1", "2"}
    assert found["one_file"] is True
    assert (
        "3 MoE layers measured, and the line through 1 and 2, without them, there:" in done.stdout
    )
    assert found["servers"][0]["interference"]["beside"]["count"] >= 0
    load = found["check"]["soak"]
    assert load["errors"] == 0
    assert load["answers_unchanged"]
    assert load["first_token"]["count"] == load["finished"] + load["aborted"] > 100
    # A third is broken off before its end.
    assert load["finished"] == pytest.approx(2 * load["aborted"], abs=16)
    assert load["growth"]["threads"] <= 16  # the pretended server's, one for each connection
    assert "Under load: 0.03 minutes of 16 streams" in done.stdout
    assert "1 request: 58 ms for 58 layers, so at most 17.2 tokens/s with any card" in done.stdout


def test_a_server_that_ends_is_one_error_with_its_last_words(tmp_path: Path) -> None:
    done = subprocess.run(
        command("DIE", tmp_path, "--layers", "1,2", "--own-files"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: the server does not answer" in done.stderr
    assert "out of something" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_a_server_starts_nothing_is_left(
    tmp_path: Path, number: signal.Signals
) -> None:
    mark = f"REHEARSAL_{tmp_path.name}"
    process = subprocess.Popen(
        command("HANG", tmp_path, "--layers", "1"),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        env={**os.environ, mark: "1"},
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while len(marked(mark)) < 3:  # this, the server and its child
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}{process.pid}"]
        process.send_signal(number)
        status = process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert status == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert marked(mark) == []


def marked(name: str) -> list[int]:
    """Processes that have the variable."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{name}=1".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_folder_goes_when_its_program_fails_and_when_it_was_killed(tmp_path: Path) -> None:
    finished = subprocess.Popen(["true"])
    finished.wait()
    killed = tmp_path / f"{PREFIX}{finished.pid}"
    killed.mkdir()
    other, running = tmp_path / "other", tmp_path / f"{PREFIX}1"
    other.mkdir()
    running.mkdir()
    with contextlib.suppress(ZeroDivisionError), workspace(tmp_path) as folder:
        (folder / "big").write_text("x")
        assert not killed.exists()
        raise ZeroDivisionError
    assert sorted(tmp_path.iterdir()) == sorted([other, running])


def test_files_in_two_folders_go_from_both(tmp_path: Path) -> None:
    parents = [tmp_path / "memory", tmp_path / "disk", tmp_path / "memory"]
    for parent in parents[:2]:
        parent.mkdir()
    with contextlib.suppress(ZeroDivisionError), workspaces(parents) as (a, b, same):
        assert (a.parent, b.parent, same) == (parents[0], parents[1], a)
        (a / "big").write_text("x")
        raise ZeroDivisionError
    assert [list(parent.iterdir()) for parent in parents] == [[], [], []]


def test_a_check_that_cannot_be_served_loses_nothing_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest server may run out of memory after minutes of measuring the others."""
    for module in (plan, result):
        monkeypatch.setattr(module, "v32_layout", small.layout)
    monkeypatch.setattr(rehearsal, "with_moe_layers", small.with_moe_layers)
    monkeypatch.setattr(packed_layers, "DRAWN", 1 << 22)
    monkeypatch.setattr(checkpoint, "DRAWN", (1 << 20) - 3)
    monkeypatch.setattr(
        limits, "read_bandwidth", lambda threads, seconds: limits.Measured(50, 49, 0)
    )

    def measure(layers: int, *_: object) -> dict[str, Any]:
        if layers == 3:
            raise RuntimeError("the server ended with status -9")
        cell = {"seconds": [0.1 * layers], "experts": 8.0, "prepare": 0.0, "workers": 1e-3}
        return {"layers": layers, "decode": {"1": cell}, "prefill": {}, "memory_bytes": 1e9}

    monkeypatch.setattr(variant, "measure", measure)
    folder, output = tmp_path / "files", tmp_path / "r.json"
    folder.mkdir()
    options = ["--cpu", "--memory", "64", "--folder", str(folder), "--json", str(output)]
    assert rehearsal.main([*options, "--layers", "1,2", "--check", "3"]) == 2
    shown = capsys.readouterr()
    assert "3 MoE layers, to check the line, could not be measured." in shown.out
    assert "error: the server ended with status -9" in shown.err
    found = json.loads(output.read_text())
    assert found["fits"]["decode"]["1"]["seconds"] == pytest.approx(5.8)
    assert found["check"] == {"layers": 3, "error": "the server ended with status -9"}
    assert "line_check" not in found
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "99"], "expected auto, a number of MoE layers from 1 to 58"),
        (["--layers", "1", "--check", "2"], "expected at least two other numbers of MoE layers"),
        (["--rounds", "0"], "--rounds and --resident: expected at least 1, and 0 to 255"),
    ],
)
def test_a_mistake_is_one_clear_error(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.rehearsal.__main__ import main

    assert main(["--cpu", "--folder", str(tmp_path), *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert len(errors.splitlines()) == 1
