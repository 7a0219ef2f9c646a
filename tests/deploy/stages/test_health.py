"""What ``health`` makes of the state files and of the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local_http import http_status
from deploy.stages.health import examine, find_state, is_healthy
from deploy.state import (
    StageState,
    State,
    read_state,
    write_state,
)
from kt_kernel.load_progress import PROGRESS_VARIABLE, LoadProgress
from kt_kernel.server_phase import tell_phase
from tests.deploy.helpers import LocalHub, Prepared, clean_environment, command, run
from tests.deploy.stage_states import health, other_process


def test_nothing_started(tmp_path: Path) -> None:
    status, line = health(tmp_path)
    assert status == 1
    assert line == f"nothing has been started (no state in KT_RUN_DIR {tmp_path})"


def test_a_mistake_in_the_settings_is_unhealthy(tmp_path: Path) -> None:
    result = run("health", KT_PORT="x")
    assert result.returncode == 1
    assert "KT_PORT: expected" in result.stderr


def test_a_server_says_how_far_it_has_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[int], str]
) -> None:
    (tmp_path / "serve-layers.json").write_text('{"done": 58, "total": 58}')
    state = StageState(tmp_path, "serve")
    state.set("loading")
    for name, value in state.for_server().items():
        monkeypatch.setenv(name, value)
    assert health(tmp_path) == (1, "loading"), "told the progress of an earlier server"
    progress = LoadProgress(58)
    for layer in range(3, 20):
        progress.line(layer, 1, 0.0, 1.0)
    assert health(tmp_path) == (1, "loading 17 of 58 layers")
    found = read_state(tmp_path, "serve")
    assert found is not None
    for status, line in ((503, "warming up"), (200, "ready")):
        url = f"http://127.0.0.1:{server(status)}/health"
        assert examine(found, tmp_path, url).line() == line


def test_an_ordered_end_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when only those who ask while a server lives learn that it was ready."""
    (tmp_path / "serve-phase").write_text("ending")  # of an earlier server
    url = "http://127.0.0.1:9/health"
    with other_process(tmp_path, "serve", "loading") as process:
        monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "serve-layers.json"))
        (tmp_path / "serve-phase").unlink()
        for phase, line in (("ready", "failed: .* does not answer"), ("ending", "ending")):
            tell_phase(phase)
            found = read_state(tmp_path, "serve")
            assert found is not None
            assert found.phase == phase
            assert re.match(line, examine(found, tmp_path, url).line())
        process.kill()
        process.wait()
        assert found is not None
        told = examine(found, tmp_path, url)
        assert told.line() == "stopped: the server was told to end"
        assert not is_healthy(told)
        tell_phase("ready")  # as if it had died without an order
        found = read_state(tmp_path, "serve")
        assert found is not None
        assert "ended without a word while ready" in examine(found, tmp_path, url).line()


def test_what_an_earlier_server_said_is_over(tmp_path: Path) -> None:
    (tmp_path / "serve-phase").write_text("ending")
    state = StageState(tmp_path, "serve")
    state.for_server()
    state.set("loading")
    found = read_state(tmp_path, "serve")
    assert found is not None
    assert found.phase == "loading"


def test_a_server_that_waits_for_its_turn_is_not_asked(tmp_path: Path) -> None:
    """For a moment after the conversion it was told to have failed, since nothing listened."""
    state = StageState(tmp_path, "serve")
    state.set("waiting", "convert")
    found = read_state(tmp_path, "serve")
    assert found is not None
    told = examine(found, tmp_path, "http://127.0.0.1:9/health")
    assert told.line() == "serve waits for convert"


def test_a_server_through_its_life(tmp_path: Path, server: Callable[[int], str]) -> None:
    here = {"KT_HOST": "127.0.0.1"}
    state = StageState(tmp_path, "serve")
    state.set("checking")
    assert health(tmp_path, **here, KT_PORT=server(200)) == (1, "checking")  # not ours yet
    state.set("loading")
    assert health(tmp_path, **here, KT_PORT="1") == (1, "loading")
    assert health(tmp_path, **here, KT_PORT=server(503)) == (1, "warming up")
    assert health(tmp_path, **here, KT_PORT=server(200)) == (0, "ready")
    status, line = health(tmp_path, **here, KT_PORT="1")
    assert status == 1
    assert line.startswith("failed: http://127.0.0.1:1/health does not answer: ")
    status, line = health(tmp_path, **here, KT_PORT=server(503))
    assert (status, line[-8:]) == (1, "HTTP 503")
    status, text = health(tmp_path, "--json", **here, KT_PORT=server(200))
    report = json.loads(text)
    assert status == 0
    assert (report["healthy"], report["state"], report["stage"]) == (True, "ready", "serve")
    assert report["pid"] == os.getpid()


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 x\r\n\r\n", b"x" * 70_000])
def test_a_server_that_speaks_no_http(answer: bytes) -> None:
    """Another program has the port: no answer, and no traceback of `health`."""
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def serve() -> None:
            connection, _ = taken.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        status, problem = http_status(f"http://127.0.0.1:{taken.getsockname()[1]}/health")
    assert status is None
    assert problem
    assert len(problem.splitlines()) == 1


def test_an_address_that_is_none() -> None:
    for url in ("http://[::1/health", "http://a:b/health", f"http://{'ü' * 70}/health"):
        assert http_status(url)[0] is None


def test_which_stage_is_told(tmp_path: Path) -> None:
    write_state(tmp_path, State("download", "done", started=1.0))
    write_state(tmp_path, State("convert", "failed", "x", started=2.0))
    latest = find_state(tmp_path, None)
    assert latest is not None
    assert latest.stage == "convert"
    assert health(tmp_path, "--stage", "download") == (0, "download finished")
    StageState(tmp_path, "download").set("downloading")
    running = find_state(tmp_path, None)
    assert running is not None
    assert running.stage == "download"


@pytest.mark.parametrize(
    ("states", "told"),
    [
        # The earlier stages ran again, then the server died.
        ([("download", "done", 3), ("convert", "done", 4), ("serve", "failed", 2)], "serve"),
        # Mended by hand after the failure.
        ([("download", "failed", 1), ("convert", "done", 2)], "convert"),
        ([("download", "failed", 3), ("convert", "done", 2)], "download"),
        # Without a word: its process is gone.
        ([("download", "done", 3), ("convert", "converting", 2)], "convert"),
    ],
)
def test_a_failure_is_told_until_a_later_stage_was_started(
    tmp_path: Path, states: list[tuple[str, str, int]], told: str
) -> None:
    for stage, phase, started in states:
        write_state(tmp_path, State(stage, phase, started=float(started)))
    state = find_state(tmp_path, None)
    assert state is not None
    assert state.stage == told


def test_a_failed_serve_says_why(tmp_path: Path) -> None:
    result = run("serve", KT_RUN_DIR=str(tmp_path), KT_MODEL_PATH="/no", KT_DEVICE="cpu")
    assert result.returncode == 2
    status, line = health(tmp_path)
    assert status == 1
    assert line.startswith("failed: model: expected a complete checkpoint in KT_MODEL_PATH /no")


def test_wrong_settings_are_a_state_too(tmp_path: Path) -> None:
    assert run("convert", KT_RUN_DIR=str(tmp_path), KT_METHOD="x").returncode == 2
    status, line = health(tmp_path)
    assert status == 1
    assert line.startswith("failed: KT_METHOD: expected one of AMXINT4")


def test_convert_tells_its_end(prepared: Prepared, tmp_path: Path) -> None:
    settings = {
        "KT_RUN_DIR": str(tmp_path / "run"),
        "KT_MODEL_PATH": str(prepared.model),
        "KT_WEIGHT_PATH": str(shutil.copytree(prepared.int4, tmp_path / "weights")),
    }
    assert run("convert", **settings).returncode == 0
    assert health(tmp_path / "run") == (0, "convert finished")
    state = read_state(tmp_path / "run", "convert")
    assert state is not None
    assert not (tmp_path / "weights" / "convert.json").exists()
    # The weights of another method are refused by the converter itself.
    assert run("convert", **settings, KT_QUANT_METHOD="int8").returncode == 2
    status, line = health(tmp_path / "run")
    assert status == 1
    assert "holds int4 weights" in line


def test_download_tells_bytes_and_survives_a_kill(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = start_hub(shards=4, shard_bytes=3_000_000, rate=1_000_000.0)
    settings = hub.settings(tmp_path / "model", KT_RUN_DIR=str(tmp_path / "run"))
    process = subprocess.Popen(
        command("download"), env=clean_environment(**settings), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        line, status = "", 0
        while not line.startswith("downloading "):
            assert time.monotonic() < deadline, line
            assert process.poll() is None
            status, line = health(tmp_path / "run")
        assert status == 0
        assert line.endswith(" of 12.0 MB")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    status, line = health(tmp_path / "run")
    assert status == 1
    assert line.startswith("failed: the process ended without a word while downloading ")
    hub.options.rate = None
    assert run("download", **settings).returncode == 0
    assert health(tmp_path / "run") == (0, "download finished")
    assert run("download", **{**settings, "KT_MODEL_ID": "lab/other"}).returncode == 2
    assert "holds lab/small" in health(tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("stage", "phase", "healthy"),
    [
        ("download", "downloading", True),
        ("convert", "converting", True),
        ("convert", "done", True),
        ("convert", "failed", False),
        ("serve", "checking", False),
        ("serve", "loading", False),
        ("serve", "ready", True),
        ("serve", "failed", False),
    ],
)
def test_what_counts_as_healthy(stage: str, phase: str, healthy: bool) -> None:
    assert is_healthy(State(stage, phase)) == healthy
