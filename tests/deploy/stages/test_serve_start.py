"""What ``serve`` becomes, short of becoming it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from deploy.launch import endpoint as endpoints
from deploy.launch.argv import Command, serve_command
from deploy.settings.config import load
from deploy.stages import serve
from kt_kernel.errors import UserError
from kt_kernel.host.addresses import bound, free_port
from tests.deploy.helpers import LAPTOP, fails, run


def test_the_server_gets_the_variables_that_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Command, dict[str, str]]] = []
    monkeypatch.setattr(serve, "export", lambda _: None)  # it would change this process
    monkeypatch.setattr(serve, "check_registered", lambda: None)
    monkeypatch.setattr(serve, "survey", lambda: LAPTOP)
    monkeypatch.setattr(serve, "run_checks", lambda *_: [])

    def become(*words: Any) -> NoReturn:
        started.append(words)
        sys.exit()

    monkeypatch.setattr(serve, "become", become)
    given = {"KT_DEVICE": "cpu", "KT_PORT": str(free_port()), "OTHER": "kept"}
    config = load(given, [], "serve")
    with pytest.raises(SystemExit):
        serve.run(config, print_only=False, as_json=False)
    ((command, environment),) = started
    wanted = serve_command(config, LAPTOP)
    assert command == wanted
    assert wanted.environment["KT_DEVICE"] == "cpu"
    assert environment == {**given, **wanted.environment}


def test_a_port_that_is_taken_after_its_check_is_one_error() -> None:
    port = free_port()
    with bound("127.0.0.1", port) as other:
        other.listen()
        expected = f"KT_PORT: expected port {port} on 127.0.0.1 to be free, found Address already"
        with pytest.raises(UserError, match=expected), serve.hold_address("127.0.0.1", port):
            pytest.fail("it went on")


def test_bytes_that_are_no_text_are_refused() -> None:
    """SGLang ended with a traceback when it handed the path to its scheduler."""
    settings = {"KT_DEVICE": "cpu", "KT_MODEL_PATH": os.fsdecode(b"/models/\xfc")}
    printed = run("serve", "--print", PYTHONIOENCODING="ascii", **settings)
    assert printed.returncode == 0, printed.stderr
    assert "--model '/models/\\udcfc'" in printed.stdout
    line = fails("serve", **settings)
    assert line.startswith("error: KT_MODEL_PATH: expected text in UTF-8")


def child(code: str) -> subprocess.Popen[bytes]:
    return serve.start(Command(["python", "-c", code], {}), dict(os.environ))


@pytest.fixture
def signals() -> Iterator[None]:
    """This process's handlers are its own again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def told_to_end_at(file: Path) -> Iterator[list[str]]:
    """SIGTERM for this process as soon as a file is there; gives what was in it then."""
    found: list[str] = []

    def tell() -> None:
        while not file.exists():
            time.sleep(0.01)
        found.append(file.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield found
    finally:
        teller.join()


def test_the_status_of_a_server_in_its_turn(signals: None) -> None:
    """2 stays 2, which is not started again; a crash is one for the engine, too."""
    assert serve.status_of(child("raise SystemExit(2)")) == 2
    assert serve.status_of(child("import os; os.kill(os.getpid(), 9)")) == 128 + 9


READY = """
import http.server, os, pathlib, signal, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
def end(*_):
    pathlib.Path(seen).write_text(str(pathlib.Path(file).exists()))
    os._exit(0)
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


def test_the_address_goes_before_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: None
) -> None:
    """A router that follows the file sends nothing to a server that drains."""
    monkeypatch.setattr(endpoints, "POLL_SECONDS", 0.05)
    file, seen, port = tmp_path / "run" / "node", tmp_path / "seen", free_port()
    file.parent.mkdir()
    file.write_text("of a server that was killed")
    endpoint = endpoints.Endpoint(file, endpoints.url_for_others("0.0.0.0", port))
    assert not file.exists()
    assert not endpoints.is_ready("0.0.0.0", port)
    server = child(f"file, seen, port = {str(file)!r}, {str(seen)!r}, {port}\n{READY}")
    endpoint.follow(lambda: endpoints.is_ready("0.0.0.0", port))
    with told_to_end_at(file) as found:
        assert serve.status_of(server, endpoint) == 128 + signal.SIGTERM
    assert found == [f"http://{socket.gethostname()}:{port}\n"]
    assert (seen.read_text(), file.exists()) == ("False", False)


def test_addresses_for_other_hosts() -> None:
    assert endpoints.url_for_others("10.0.0.7", 1) == "http://10.0.0.7:1"
    assert endpoints.url_for_others("fd00::7", 1) == "http://[fd00::7]:1"


def test_a_drain_that_takes_too_long_ends(tmp_path: Path, signals: None) -> None:
    listening = tmp_path / "listening"
    server = child(
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(listening)!r}).touch(); time.sleep(600)"
    )

    with told_to_end_at(listening):
        assert serve.status_of(server, None, 0) == 128 + signal.SIGTERM


@pytest.mark.timeout(60)
def test_a_second_signal_comes_while_the_address_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: None
) -> None:
    """Its handler ran in the middle of the first one's, and waited for the lock of that one."""
    ready = tmp_path / "ready"
    endpoint = endpoints.Endpoint(tmp_path / "node", "http://node:1")
    told: list[bool] = []

    def slow(path: Path, missing_ok: bool = False) -> None:  # as on a file system of others
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        told.append(missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    server = child(f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(600)")

    with told_to_end_at(ready):
        assert serve.status_of(server, endpoint, 30) == 128 + signal.SIGTERM
    assert told


def test_the_server_ends_with_its_parent() -> None:
    """After a kill -9 nobody would know of it."""
    code = (
        "import os, time; from deploy.stages import serve; from deploy.launch.argv import Command;"
        "server = serve.start(Command(['python', '-c', 'import time; time.sleep(600)'], {}),"
        " dict(os.environ)); print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{server}/stat").exists():
        if Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_is_told_to_end_ends_by_the_signal(tmp_path: Path, signals: None) -> None:
    """An engine that stops with the machine starts again what did not end with 0."""
    listening = tmp_path / "listening"
    server = child(
        "import pathlib, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
        f"pathlib.Path({str(listening)!r}).touch(); signal.pause()"
    )

    with told_to_end_at(listening):
        assert serve.status_of(server) == 128 + signal.SIGTERM
