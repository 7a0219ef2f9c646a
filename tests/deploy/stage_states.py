"""Stages whose state the tests of ``health`` and ``status`` read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from deploy.state import (
    State,
    read_state,
    write_state,
)
from tests.deploy.helpers import run


def health(directory: Path, *words: str, **settings: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    result = run("health", *words, KT_RUN_DIR=str(directory), **settings)
    assert result.stderr == ""
    return result.returncode, result.stdout.strip()


@contextmanager
def other_process(directory: Path, stage: str, phase: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the stage, and becomes another program as ``serve`` does."""
    code = (
        "import os, sys; from pathlib import Path; from deploy.state import StageState;"
        "StageState(Path(sys.argv[1]), sys.argv[2]).set(sys.argv[3]); print('set', flush=True);"
        "os.execvp('sleep', ['sleep', '60'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory), stage, phase],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "set\n"
        yield process
    finally:
        process.kill()
        process.wait()


def as_of_another_container(directory: Path, stage: str) -> State:
    """Make the state look as if its process could not be seen from here."""
    state = read_state(directory, stage)
    assert state is not None
    state = replace(state, pid_namespace="pid:[1]")
    write_state(directory, state)
    return state
