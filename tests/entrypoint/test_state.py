"""The state files of the stages, and ``health`` and ``status``, which read them."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from deploy.health import examine, find_state, http_status, is_healthy
from deploy.state import (
    StageState,
    State,
    read_state,
    run_directory,
    write_state,
)
from deploy.status import listen, overall_state
from kt_kernel.loading import LoadProgress
from tests.entrypoint.helpers import LocalHub, Prepared, clean_environment, command, run


def health(directory: Path, *words: str, **settings: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    result = run("health", *words, KT_RUN_DIR=str(directory), **settings)
    assert result.stderr == ""
    return result.returncode, result.stdout.strip()


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
    ],
)  # fmt: skip
def test_lines_for_people(state: State, line: str) -> None:
    assert state.line() == line


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


def test_nothing_started(tmp_path: Path) -> None:
    status, line = health(tmp_path)
    assert status == 1
    assert line == f"nothing has been started (no state in KT_RUN_DIR {tmp_path})"


def test_a_mistake_in_the_settings_is_unhealthy(tmp_path: Path) -> None:
    result = run("health", KT_PORT="x")
    assert result.returncode == 1
    assert "KT_PORT: expected" in result.stderr


def test_the_automatic_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_directory("auto") == tmp_path / "kt-kernel"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "no"))
    assert run_directory("auto").name == f"kt-kernel-{os.getuid()}"
    assert run_directory(tmp_path) == tmp_path


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


class _Answer(http.server.BaseHTTPRequestHandler):
    status: ClassVar[int] = 200

    def do_GET(self) -> None:
        assert self.path == "/health"
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """Something that answers /health with a status, as SGLang's server does."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def port(status: int) -> str:
            _Answer.status = status
            return str(running.server_address[1])

        yield port
        running.shutdown()


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


@contextmanager
def status_server(directory: Path, url: str) -> Iterator[Callable[[], tuple[int, str]]]:
    """Call it for the HTTP status of ``GET /health`` and the state in its answer."""
    with listen("127.0.0.1", 0, directory, url) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"

        def ask() -> tuple[int, str]:
            answer = httpx.get(f"{address}/health", trust_env=False)
            return answer.status_code, answer.json()["state"]

        yield ask
        answer = httpx.get(f"{address}/metrics", trust_env=False)
        assert (answer.status_code, answer.json()) == (
            404,
            {"error": "expected GET /health, found /metrics"},
        )
        running.shutdown()


def test_status_through_all_stages(tmp_path: Path, server: Callable[[int], str]) -> None:
    url = f"http://127.0.0.1:{server(503)}/health"
    with status_server(tmp_path, url) as ask:
        assert ask() == (503, f"nothing has been started (no state in KT_RUN_DIR {tmp_path})")
        with other_process(tmp_path, "download", "asking the Hub"):
            as_of_another_container(tmp_path, "download")
            assert ask() == (503, "asking the Hub")
        assert ask()[1].startswith("failed: the process ended without a word while asking the Hub")
        state = StageState(tmp_path, "convert")
        with state.watch("converting", 58, lambda: 17, "layers"):
            assert ask() == (503, "converting 17 of 58 layers")
        state.set("done")
        assert ask() == (503, "convert finished")
        with other_process(tmp_path, "serve", "loading") as process:
            as_of_another_container(tmp_path, "serve")
            assert ask() == (503, "warming up")
            server(200)
            assert ask() == (200, "ready")
            # An `up` while it serves runs the earlier stages again.
            with other_process(tmp_path, "download", "verifying"):
                assert ask() == (200, "ready")
            write_state(tmp_path, State("download", "done", started=time.time()))
            process.kill()
            process.wait()
            # Whatever answers on the port now, it is not this server.
            assert ask()[1].startswith("failed: the process ended without a word while ready")


def test_status_of_servers_that_leave_no_state(
    tmp_path: Path, server: Callable[[int], str]
) -> None:
    url = f"http://127.0.0.1:{server(200)}/health"
    assert overall_state(tmp_path, url) == State("serve", "ready")
    # One that served here before the servers elsewhere.
    write_state(tmp_path, State("serve", "ready"))
    elsewhere, here = overall_state(tmp_path, url, elsewhere=True), overall_state(tmp_path, url)
    assert elsewhere is not None
    assert is_healthy(elsewhere)
    assert here is not None
    assert not is_healthy(here)
    (tmp_path / "serve.json").unlink()
    write_state(tmp_path, State("convert", "failed", "no space"))
    failed = overall_state(tmp_path, url)
    assert failed is not None
    assert failed.line() == "failed: no space"


def test_status_ends_when_told_to_and_refuses_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = {"KT_RUN_DIR": str(tmp_path), "KT_HOST": "127.0.0.1", "KT_STATUS_PORT": port}
        result = run("status", **settings)
        assert result.returncode == 2
        assert result.stderr == (
            f"error: cannot listen on KT_HOST 127.0.0.1, KT_STATUS_PORT {port}: Address already in "
            f"use: choose another port\n"
        )
    process = subprocess.Popen(
        command("status"), env=clean_environment(**settings), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("status: GET /health on port ")
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


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


def test_printing_is_no_state(tmp_path: Path) -> None:
    assert run("serve", "--print", KT_RUN_DIR=str(tmp_path), KT_DEVICE="cpu").returncode == 0
    assert list(tmp_path.iterdir()) == []


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
