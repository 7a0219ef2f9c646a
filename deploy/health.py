"""The stage ``health``: what the stages are doing, in one line and one exit status.

Fit for a container's health check in every stage. The truth about a server that has loaded is its
own ``GET /health``; before that, and for the other stages, it is the state file.
:mod:`deploy.status` tells the same to the network.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

from deploy.address import base_url
from deploy.config import Config
from deploy.state import (
    DONE,
    FAILED,
    READY,
    STATEFUL,
    State,
    read_state,
    run_directory,
    write_state,
)

HTTP_TIMEOUT = 10.0  # seconds; the answer costs nothing, but the cores may be busy
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


def health_url(config: Config) -> str:
    """Where the server on this machine says how it is."""
    return f"{base_url(config)}/health"


def find_state(directory: Path, stage: str | None) -> State | None:
    """The state of a stage.

    Without ``stage``, of one that runs; else of one that failed, unless a later stage was started
    after it; else of the latest.
    """
    states = [read_state(directory, name) for name in ([stage] if stage else STATEFUL)]
    found = [state for state in states if state is not None]

    def matters(state: State) -> tuple[int, float]:
        if state.phase == DONE:
            return 0, state.started
        if state.phase != FAILED and state.is_alive(directory):
            return 2, state.started
        later = found[found.index(state) + 1 :]
        return int(all(other.started < state.started for other in later)), state.started

    return max(found, key=matters, default=None)


def is_healthy(state: State) -> bool:
    """Whether all is well: at work or finished; for a server, ready."""
    return state.phase == READY if state.stage == "serve" else state.phase != FAILED


def examine(state: State, directory: Path, url: str) -> State:
    """What is true now: the state file, corrected by what its process and its server say.

    Args:
        url: where the server says how it is.
    """
    if state.phase in (DONE, FAILED):
        return state
    if not state.is_alive(directory):
        reason = f"the process ended without a word while {state.line()}"
        return replace(
            state, phase=FAILED, message=f"{reason}: it was killed or crashed, its log may say more"
        )
    if may_listen(state):
        return _ask_server(state, directory, url)
    return state


def may_listen(state: State) -> bool:
    """Whether the state is that of a server which has passed its checks."""
    return state.stage == "serve" and state.phase not in ("starting", "checking", FAILED)


def _ask_server(state: State, directory: Path, url: str) -> State:
    status, problem = http_status(url)
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
        return replace(state, phase=FAILED, message=f"{url} answers HTTP {status}")
    if state.phase in _STARTING:
        return state  # SGLang listens when it has loaded
    return replace(state, phase=FAILED, message=f"{url} does not answer: {problem}")


def _now(state: State, phase: str) -> State:
    """The state in its next phase; how many layers were loaded is over."""
    return replace(state, phase=phase, done=None, total=None, unit="")


def http_status(url: str) -> tuple[int | None, str]:
    """HTTP status of a GET, or None and what kept it from being answered."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a local program
    try:
        with opener.open(url, timeout=HTTP_TIMEOUT) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError as error:
        return None, str(error.reason)
    except (OSError, ValueError, http.client.InvalidURL) as error:
        return None, str(error)
    except http.client.HTTPException:  # another program has the port
        return None, "what answers there does not speak HTTP"
