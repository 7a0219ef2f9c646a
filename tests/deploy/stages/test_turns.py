"""Stages that start at once and wait for each other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from deploy.command_line import build_parser
from deploy.stages.health import find_state
from deploy.stages.registry import STAGES
from deploy.stages.turns import START_SECONDS, what_to_wait_for
from deploy.state import StageState, State, read_state, write_state
from kt_kernel.host.addresses import free_port
from tests.deploy.helpers import Prepared, clean_environment, command, run


@pytest.mark.parametrize(
    ("states", "is_there", "waits_for"),
    [
        # The machine was started again: no states, what is on the disk counts.
        ([], True, ""),
        ([], False, "download"),
        ([("download", "done", 0.0)], False, ""),
        ([("download", "failed", 0.0)], True, "download, which failed"),
        ([("download", "downloading", 0.0)], False, "download, which ended without a word"),
        # An `up`: what an earlier one left is not what this one's download will say.
        ([("download", "done", -9.0), ("check", "done", 0.0)], True, "download"),
        ([("download", "done", 0.0), ("check", "done", -9.0)], True, ""),
        # A check that no `up` followed does not keep a server from starting again.
        ([("download", "done", -9999.0), ("check", "done", -START_SECONDS - 1)], True, ""),
        ([("check", "done", -START_SECONDS - 1)], False, "download"),
    ],
)
def test_what_is_waited_for(
    tmp_path: Path, states: list[tuple[str, str, float]], is_there: bool, waits_for: str
) -> None:
    now = time.time()
    for stage, phase, at in states:
        write_state(tmp_path, State(stage, phase, started=now + at, updated=now + at))
    assert what_to_wait_for("download", tmp_path, lambda: is_there) == waits_for


def test_a_stage_at_work_is_waited_for(tmp_path: Path) -> None:
    StageState(tmp_path, "download").set("downloading")
    assert what_to_wait_for("download", tmp_path, lambda: True) == "download"


def test_one_that_works_is_told_before_those_that_wait(tmp_path: Path) -> None:
    def told() -> str:
        state = find_state(tmp_path, None)
        assert state is not None
        return state.line()

    StageState(tmp_path, "serve").set("waiting", "convert")
    StageState(tmp_path, "convert").set("waiting", "download")
    assert told() == "convert waits for download"
    write_state(tmp_path, State("download", "failed", "no token", started=1.0))
    assert told() == "failed: no token"
    write_state(tmp_path, State("download", "done"))
    assert told() == "convert waits for download"
    StageState(tmp_path, "download").set("downloading")
    assert told() == "downloading"


@contextmanager
def started(*words: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*words),
        env=clean_environment(**settings),
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(directory: Path, stage: str, is_so: Callable[[State], bool]) -> State:
    deadline = time.monotonic() + 60
    while True:
        state = read_state(directory, stage)
        if state is not None and is_so(state):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


def test_a_failed_stage_begins_anew_after_a_check(prepared: Prepared, tmp_path: Path) -> None:
    """The same process: the engine must not count a mistake as a crash."""
    states, model = tmp_path / "run", tmp_path / "model"
    paths = {
        "KT_MODEL_PATH": str(model),
        "KT_WEIGHT_PATH": str(tmp_path / "weights"),
        "KT_RUN_DIR": str(states),
    }
    write_state(states, State("download", "done", started=time.time()))
    with started("convert", "--in-turn", **paths) as process:
        failed = wait_for(states, "convert", lambda state: state.phase == "failed")
        assert "does not exist" in failed.message
        model.symlink_to(prepared.model)
        # What a check that fails says changes nothing.
        write_state(states, State("check", "failed", "x", started=time.time()))
        time.sleep(1.5)
        assert wait_for(states, "convert", lambda _: True) == failed
        assert process.poll() is None
        write_state(states, State("check", "done", started=time.time()))
        write_state(states, State("download", "done", started=time.time()))
        assert process.wait(60) == 0
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
        assert all(re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \S", line) for line in lines)
        assert len([line for line in lines if "] error: " in line]) == 1
        after = read_state(states, "convert")
        assert after is not None
        assert (after.phase, after.pid) == ("done", process.pid)
        # It waited before the download was started, and is the latest all the same.
        latest = find_state(states, None)
        assert latest is not None
        assert latest.line() == "convert finished"


def test_a_job_waits_for_the_result_and_ends_after_a_mistake(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Nothing tells it what the stage before does: jobs of a cluster have no states in common."""
    states, model = tmp_path / "run", tmp_path / "model"
    paths = {
        "KT_MODEL_PATH": str(model),
        "KT_WEIGHT_PATH": str(tmp_path / "weights"),
        "KT_RUN_DIR": str(states),
    }
    with started("convert", "--wait", **paths) as process:
        waiting = wait_for(states, "convert", lambda state: state.phase == "waiting")
        assert waiting.line() == "convert waits for download"
        model.symlink_to(prepared.model)
        assert process.wait(60) == 0
    mistaken = run("convert", "--wait", **paths, KT_INPUT_TYPE="bf16")
    assert mistaken.returncode == 2
    assert mistaken.stderr.splitlines()[-1].startswith("error: ")
    both = run("serve", "--wait", "--in-turn")
    assert both.returncode == 2
    assert "--in-turn waits, too: leave out --wait" in both.stderr


@pytest.mark.parametrize(
    ("words", "with_times"),
    [
        ("convert --in-turn", True),
        ("convert", False),
        ("check --first --tell", True),
        ("check --first", False),
        ("check --tell --json", False),
        ("status", True),
        ("status --follow", False),
        ("status --each", False),
    ],
)
def test_what_a_container_runs_has_times_in_its_log(words: str, with_times: bool) -> None:
    """And what people or programs read at once has none."""
    args = build_parser().parse_args(words.split())
    assert STAGES[args.stage].writes_log(args) == with_times


def test_status_answers_with_wrong_settings_and_is_followed(tmp_path: Path) -> None:
    states, port = tmp_path / "run", str(free_port())
    write_state(states, State("download", "failed", "no token", started=1.0))
    here = {"KT_STATUS_PORT": port, "KT_RUN_DIR": str(states), "KT_HOST": "127.0.0.1"}
    with started("status", KT_CPUINFERR="1", KT_CPUINFER="many", **here) as process:
        result = run("status", "--follow", **here)
        assert (result.returncode, result.stdout) == (1, "error: download: no token\n")
        result = run("status", "--each", **here)
        assert (result.returncode, result.stdout) == (1, "download: failed: no token\n")
        process.terminate()
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert "] warning: unknown setting KT_CPUINFERR: did you mean KT_CPUINFER?" in lines[0]
    assert "] warning: KT_CPUINFER: expected an integer" in lines[1]
