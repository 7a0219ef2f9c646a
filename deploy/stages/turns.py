"""Stages that start at once, each in a container of its own, and take their turns.

The engine starts all containers in one go, after `check`; nobody has to stay to start the next one.
Each stage waits for the one before it (``--in-turn``). After a mistake it stays, so that the engine
does not start it again to fail again, and begins anew with the next successful `check`. Where
something else decides what follows a mistake, as the jobs of a cluster, it only waits (``--wait``).
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from deploy.console import say
from deploy.settings.row import AUTO
from deploy.state import DONE, FAILED, WAITING, StageState, read_state, run_directory

CHECK = "check"
POLL_SECONDS = 1.0
#: After a `check` all stages are started within seconds. One that was not by then is not started
#: at all: its result of an earlier time will do.
START_SECONDS = 60.0


def add_in_turn(parser: ArgumentParser) -> None:
    """The option of the stages that take turns."""
    parser.add_argument(
        "--in-turn",
        nargs="?",
        const=AUTO,
        metavar="DIR",
        help="for stages that are started at once: wait for the one before; after a mistake stay, "
        "and begin anew after the next successful check. DIR has the states of the others; the "
        "default is KT_RUN_DIR",
    )


def add_turns(parser: ArgumentParser) -> None:
    """The options of the stages before which another one runs."""
    add_in_turn(parser)
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait for the result of the stage before, and end after a mistake",
    )


def to_wait_by(args: Namespace) -> str | None:
    """Where the states of the stages before are, as for ``--in-turn``; None without waiting."""
    in_turn: str | None = args.in_turn
    return AUTO if in_turn is None and args.wait else in_turn


def problem_of(args: Namespace) -> str:
    """What is wrong with the options of :func:`add_turns` together; empty if nothing is."""
    return "--in-turn waits, too: leave out --wait" if args.wait and args.in_turn else ""


def others_directory(run_dir: str | Path, in_turn: str) -> Path:
    """Where the states of the other stages are, by KT_RUN_DIR and the value of ``--in-turn``."""
    return run_directory(run_dir) if in_turn == AUTO else Path(in_turn)


def wait_for(
    previous: str, directory: Path, state: StageState, is_there: Callable[[], bool]
) -> None:
    """Return when the stage before has done its work.

    Args:
        directory: where the state of ``previous`` is.
        is_there: whether its result is on the disk.
    """
    told = ""
    while reason := what_to_wait_for(previous, directory, is_there):
        if reason != told:
            say(f"waiting for {reason}")
            state.set(WAITING, reason)
            told = reason
        time.sleep(POLL_SECONDS)
    state.begin()


def what_to_wait_for(previous: str, directory: Path, is_there: Callable[[], bool]) -> str:
    """What keeps the next stage from its work, in words; empty if nothing does."""
    found, checked = read_state(directory, previous), read_state(directory, CHECK)
    if found is not None and (checked is None or found.started >= checked.started):
        if found.phase == DONE:
            return ""
        if found.phase == FAILED:
            return f"{previous}, which failed"
        # Perhaps to be started again.
        return previous if found.is_alive(directory) else f"{previous}, which ended without a word"
    # It has not begun since the check, or nothing is known since the machine was started.
    checked_lately = checked is not None and time.time() - checked.updated < START_SECONDS
    return "" if not checked_lately and is_there() else previous


def stay(directory: Path, state: StageState) -> NoReturn:
    """After a mistake: wait for a check that succeeds, then begin anew, as the same process."""
    since = time.time()
    say("this stage begins anew with the next `up`")
    while True:
        checked = read_state(directory, CHECK)
        if checked is not None and checked.phase == DONE and checked.started > since:
            state.hand_over()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        time.sleep(POLL_SECONDS)
