"""The state files of the stages."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.stages.health import PIPELINE, examine
from deploy.stages.registry import STAGES
from deploy.state import (
    StageState,
    State,
    read_state,
    run_directory,
)
from tests.deploy.helpers import run
from tests.deploy.stage_states import as_of_another_container, health, other_process
from tests.locks import refuse_locks


def test_health_knows_the_stages_that_keep_a_state() -> None:
    at_work = Namespace(print_only=False, tell=True)
    assert tuple(s.name for s in STAGES.values() if s.keeps_state(at_work)) == PIPELINE


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (State("download", "asking the Hub"), "asking the Hub"),
        (
            State("download", "downloading", done=12_300_000_000, total=688_600_000_000,
                  unit="bytes"),
            "downloading 12.3 of 688.6 GB",
        ),
        (
            State("download", "verifying", done=1_500_000, total=9_000_000, unit="bytes"),
            "verifying 1.5 of 9.0 MB",
        ),
        (State("download", "verifying", done=0, total=12, unit="bytes"), "verifying 0 of 12 bytes"),
        (
            State("convert", "converting", done=17, total=58, unit="layers"),
            "converting 17 of 58 layers",
        ),
        (State("convert", "done"), "convert finished"),
        (State("serve", "loading"), "loading"),
        (State("serve", "ready"), "ready"),
        (State("serve", "failed", "no model"), "failed: no model"),
        (State("serve", "waiting", "convert"), "serve waits for convert"),
    ],
)  # fmt: skip
def test_lines_for_people(state: State, line: str) -> None:
    assert state.line() == line


def test_the_automatic_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_directory("auto") == tmp_path / "kt-kernel"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "no"))
    assert run_directory("auto").name == f"kt-kernel-{os.getuid()}"
    assert run_directory(tmp_path) == tmp_path
    assert run_directory(tmp_path / "{host}") == tmp_path / socket.gethostname()


def test_progress_is_kept_while_the_work_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.state.PROGRESS_SECONDS", 0.01)
    state, done = StageState(tmp_path, "convert"), 1
    with state.watch("converting", 58, lambda: done, "layers"):
        first = read_state(tmp_path, "convert")
        assert first is not None
        assert first.line() == "converting 1 of 58 layers"
        assert first.is_alive(tmp_path)
        done = 2
        deadline = time.monotonic() + 10
        while "2 of 58" not in (read_state(tmp_path, "convert") or first).line():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    state.fail("no space")
    assert health(tmp_path) == (1, "failed: no space")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".convert.lock", "convert.json"]


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    state = StageState(tmp_path / "file" / "run", "serve")
    state.set("checking")
    state.set("loading")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: cannot write the state to KT_RUN_DIR {tmp_path}/file/run")


def test_a_directory_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage goes on and tells its state; in another container it cannot be seen to live."""
    refuse_locks(monkeypatch)
    StageState(tmp_path, "convert").set("converting")
    state = read_state(tmp_path, "convert")
    assert state is not None
    assert (state.phase, state.is_alive(tmp_path)) == ("converting", True)
    assert not replace(state, pid_namespace="pid:[1]").is_alive(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": 1'])
def test_a_damaged_file_is_no_state(tmp_path: Path, text: str) -> None:
    (tmp_path / "serve.json").write_text(text)
    assert read_state(tmp_path, "serve") is None


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    StageState(tmp_path, "download").set("downloading")
    state = read_state(tmp_path, "download")
    assert state is not None
    gone = replace(state, pid=ended_process())
    assert examine(gone, tmp_path, "").line() == (
        "failed: the process ended without a word while downloading: it was killed or crashed, "
        "its log may say more"
    )
    reused = replace(state, pid_started=state.pid_started + 1)
    assert not reused.is_alive(tmp_path)
    assert examine(replace(gone, phase="done"), tmp_path, "").phase == "done"


@pytest.mark.parametrize("stage", ["convert", "serve"])
def test_a_process_of_another_container_lives_while_its_lock_is_held(
    tmp_path: Path, stage: str
) -> None:
    with other_process(tmp_path, stage, "checking") as process:
        state = as_of_another_container(tmp_path, stage)
        assert state.is_alive(tmp_path)
        assert examine(state, tmp_path, "").line() == "checking"
        process.kill()
        process.wait()
        assert not state.is_alive(tmp_path)
        assert examine(state, tmp_path, "").line().startswith("failed: the process ended without")
    assert not state.is_alive(tmp_path / "no")


def test_a_second_server_does_not_speak_for_the_first(tmp_path: Path) -> None:
    """The process that found the port taken leaves the running one's state alone."""
    with other_process(tmp_path, "serve", "loading") as process:
        StageState(tmp_path, "serve").fail("port taken")
        state = read_state(tmp_path, "serve")
        assert state is not None
        assert (state.pid, state.phase) == (process.pid, "loading")
    StageState(tmp_path, "serve").fail("port taken")
    after = read_state(tmp_path, "serve")
    assert after is not None
    assert after.line() == "failed: port taken"


def test_printing_is_no_state(tmp_path: Path) -> None:
    assert run("serve", "--print", KT_RUN_DIR=str(tmp_path), KT_DEVICE="cpu").returncode == 0
    assert list(tmp_path.iterdir()) == []
