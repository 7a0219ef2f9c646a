"""The stage ``health``: what the stages are doing, in one line and one exit status.

Fit for a container's health check in every stage. The truth about a server that has loaded is its
own ``GET /health``; before that, and for the other stages, it is the state file.
"""

from __future__ import annotations

import contextlib
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
    if state is None:
        line, healthy = f"nothing has been started (no state in KT_RUN_DIR {directory})", False
        report: dict[str, object] = {"healthy": False, "line": line}
    else:
        found = examine(state, directory, base_url(config))
        line, healthy = found.line(), is_healthy(found)
        report = {"healthy": healthy, "line": line, **asdict(found)}
    print(json.dumps(report, indent=1) if as_json else line)
    return 0 if healthy else 1


def find_state(directory: Path, stage: str | None) -> State | None:
    """The state of a stage; without one, of a stage that runs, the latest that was started."""
    states = [read_state(directory, name) for name in ([stage] if stage else STATEFUL)]
    found = [state for state in states if state is not None]

    def running(state: State) -> bool:
        return state.phase not in (DONE, FAILED) and state.is_alive()

    return max(found, key=lambda state: (running(state), state.started), default=None)


def is_healthy(state: State) -> bool:
    """Whether all is well: at work or finished; for a server, ready."""
    return state.phase == READY if state.stage == "serve" else state.phase != FAILED


def examine(state: State, directory: Path, url: str) -> State:
    """What is true now: the state file, corrected by what its process and its server say."""
    if state.phase in (DONE, FAILED):
        return state
    if not state.is_alive():
        reason = f"the process ended without a word while {state.line()}"
        return replace(
            state, phase=FAILED, message=f"{reason}: it was killed or crashed, its log may say more"
        )
    if state.stage == "serve" and state.phase not in ("starting", "checking"):
        return _ask_server(state, directory, url)
    return state


def _ask_server(state: State, directory: Path, url: str) -> State:
    status, problem = http_status(f"{url}/health")
    if status == 200:
        if state.phase != READY:
            state = replace(state, phase=READY)
            # Remembered, so that a server that stops listening is not taken for one that loads.
            with contextlib.suppress(OSError):
                write_state(directory, state)
        return state
    if status is not None and state.phase != READY:
        return replace(state, phase="warming up")
    if status is not None:
        return replace(state, phase=FAILED, message=f"{url}/health answers HTTP {status}")
    if state.phase in _STARTING:
        return state  # SGLang listens when it has loaded
    return replace(state, phase=FAILED, message=f"{url} does not answer: {problem}")


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
    except OSError as error:
        return None, str(error)
