"""The stage ``health``: what the stages are doing, in one line and one exit status.

Fit for a container's health check in every stage. The truth about a server that has loaded is its
own ``GET /health``; before that, and for the other stages, it is the state file.
:mod:`deploy.stages.status` tells the same to the network.
"""

from __future__ import annotations

import contextlib
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from deploy.local_http import http_status, local_url
from deploy.settings.config import Config
from deploy.stages import check, convert, download, serve
from deploy.stages.stage import Stage
from deploy.state import (
    DONE,
    ENDING,
    FAILED,
    READY,
    RESTARTING,
    STOPPED,
    WAITING,
    State,
    read_state,
    run_directory,
    write_state,
)
from kt_kernel.errors import one_line
from kt_kernel.host.addresses import LOOPBACK_OF

#: The stages that keep a state, in the order in which they run.
PIPELINE = tuple(stage.STAGE.name for stage in (check, download, convert, serve))
ENDED = "the process ended without a word"
#: Phases before the server listens.
_STARTING = ("starting", "checking", "loading", "warming up")


def run(config: Config, stage: str | None, as_json: bool) -> int:
    """Print the state of ``stage``, or of the one that runs or ran last.

    Returns:
        0 if a stage is at work or finished, for ``serve`` if it is ready; else 1.
    """
    directory = run_directory(config["KT_RUN_DIR"])
    state = find_state(directory, stage)
    if state is not None:
        state = examine(state, directory, health_url(config))
    report = report_of(state, directory)
    print(json.dumps(report, indent=1) if as_json else report["state"])
    return 0 if report["healthy"] else 1


def report_of(state: State | None, directory: Path) -> dict[str, object]:
    """``healthy``, ``state`` in words, and the fields of the state if there is one."""
    if state is None:
        line = f"nothing has been started (no state in KT_RUN_DIR {directory})"
        return {"healthy": False, "state": line}
    return {"healthy": is_healthy(state), "state": state.line(), **asdict(state)}


def base_host(config: Config) -> str:
    """KT_HOST as a client on this machine reaches it."""
    host = config.text("KT_HOST")
    return LOOPBACK_OF.get(host, host)


def base_url(config: Config) -> str:
    """Address of the server as a client on this machine reaches it."""
    return local_url(config.text("KT_HOST"), config.integer("KT_PORT"))


def health_url(config: Config) -> str:
    """Where the server on this machine says how it is."""
    return f"{base_url(config)}/health"


def find_state(directory: Path, stage: str | None, but: Sequence[str] = ()) -> State | None:
    """The state of a stage.

    Without ``stage``, of those that are not in ``but``: of one that is at work; else of one that
    failed, unless a later stage began its work after it; else of the first that waits; else of the
    latest.
    """
    names = [stage] if stage else [name for name in PIPELINE if name not in but]
    states = [read_state(directory, name) for name in names]
    found = [state for state in states if state is not None]

    def matters(state: State) -> tuple[int, float]:
        if state.phase == DONE:
            return 0, state.started
        alive = state.phase != FAILED and state.is_alive(directory)
        if state.phase == ENDING and not alive:
            return 0, state.started
        if alive and state.phase == WAITING:
            return 1, -found.index(state)
        if alive:
            return 3, state.started
        later = [s for s in found[found.index(state) + 1 :] if s.phase != WAITING]
        is_over = any(other.started >= state.started for other in later)
        return 0 if is_over else 2, state.started

    return max(found, key=matters, default=None)


def is_healthy(state: State) -> bool:
    """Whether all is well: at work or finished; for a server, ready."""
    if state.stage == "serve":
        return state.phase == READY
    return state.phase not in (FAILED, RESTARTING)


def examine(state: State, directory: Path, url: str) -> State:
    """What is true now: the state file, corrected by what its process and its server say.

    Args:
        url: where the server says how it is.
    """
    if state.phase in (DONE, FAILED):
        return state
    if not state.is_alive(directory):
        if state.phase == ENDING:
            return replace(state, phase=STOPPED, message="the server was told to end")
        reason = f"{ENDED} while {state.line()}"
        return replace(
            state, phase=FAILED, message=f"{reason}: it was killed or crashed, its log may say more"
        )
    if state.may_listen and state.phase != ENDING:
        return _ask_server(state, directory, url)
    return state


def _ask_server(state: State, directory: Path, url: str) -> State:
    status, words = http_status(url)
    if status == 200 and words not in ("", READY):
        return _now(state, words)
    if status == 200:
        if state.phase != READY:
            state = _now(state, READY)
            # Remembered, so that a server that stops listening is not taken for one that loads.
            with contextlib.suppress(OSError):
                write_state(directory, state)
        return state
    if status is not None and state.phase != READY:
        return _now(state, "warming up")
    if status is not None:
        return replace(state, phase=FAILED, message=one_line(f"{url} answers HTTP {status}"))
    if state.phase in _STARTING:
        return state  # SGLang listens when it has loaded
    return replace(state, phase=FAILED, message=one_line(f"{url} does not answer: {words}"))


def _now(state: State, phase: str) -> State:
    """The state in its next phase; how many layers were loaded is over."""
    return replace(state, phase=phase, done=None, total=None, unit="")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the state as JSON")
    parser.add_argument(
        "--stage",
        choices=PIPELINE,
        dest="of_stage",
        help="the stage to tell about; the default is the one that runs or ran last",
    )


STAGE = Stage(
    "health",
    "say in one line what the stage is doing; exit status 0 if all is well",
    lambda config, args, _: run(config, args.of_stage, args.json),
    _add_arguments,
    failed=1,  # health checks of containers know 0 and 1 only
)
