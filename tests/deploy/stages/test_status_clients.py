"""The service ``status``: what it makes of a server's own words, and of any client."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from deploy.stages import status
from deploy.state import StageState

NOWHERE = "http://127.0.0.1:1/health"


class _Answer(http.server.BaseHTTPRequestHandler):
    body: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(directory: Path, url: str) -> Iterator[int]:
    """The service's port; it ends with the block."""
    with status.listen("127.0.0.1", 0, status.Deployment(directory, url)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        ask(server.server_port)  # it runs, so that it can be told to end
        server.shutdown()
    thread.join()


def ask(port: int) -> tuple[int, str]:
    """HTTP status and the state in the answer."""
    answer = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=30)
    return answer.status_code, answer.json()["state"]


@pytest.mark.parametrize(
    ("body", "state"),
    [
        (b'{"state": "stuck: no token for 301 s with 3 requests running"}', None),
        (b'{"state": "ready"}', "ready"),
        (b'{"state": 5}', "ready"),
        (b"[1]", "ready"),
        (b"\xff" * 10_000, "ready"),
        (b"", "ready"),
    ],
)
def test_what_a_server_says_of_itself_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, state: str | None
) -> None:
    """It lives, and answers 200, but gets no further. Others say nothing of themselves."""
    monkeypatch.setattr(_Answer, "body", body)
    expected = (200, state) if state else (503, json.loads(body)["state"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with running(tmp_path, f"http://127.0.0.1:{server.server_address[1]}/health") as port:
            assert ask(port) == expected  # a server elsewhere
            StageState(tmp_path, "serve").set("loading")
            assert ask(port) == expected
        server.shutdown()


def test_one_thread_whoever_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clients that send nothing, half a request or nonsense, that go away, and too many."""
    monkeypatch.setattr(status, "MOST_CONNECTIONS", 20)
    with running(tmp_path, NOWHERE) as port, ExitStack() as stack:
        answer = ask(port)
        threads = threading.active_count()
        address = ("127.0.0.1", port)
        slow = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(60)]
        for number, one in enumerate(slow):
            with suppress(OSError):  # it is one of the oldest, and closed already
                one.sendall((b"", b"GET /health HTTP/1.1\r\nX: ", b"\xff\r\n\r\n")[number % 3])
            assert threading.active_count() <= threads + 1
            if number % 7 == 0:
                assert ask(port) == answer
        for _ in range(5):
            with socket.create_connection(address, 20) as goes:
                goes.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                goes.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        with socket.create_connection(address, 20) as long, suppress(ConnectionResetError):
            long.sendall(b"GET /" + b"x" * 20_000)
            assert long.recv(1) == b""
        assert ask(port) == answer
        with suppress(ConnectionResetError):
            assert slow[0].recv(1) == b""
    assert capfd.readouterr().err == ""


def test_a_client_that_sends_nothing_has_some_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "REQUEST_SECONDS", 0.05)
    with (
        running(tmp_path, NOWHERE) as port,
        socket.create_connection(("127.0.0.1", port), 20) as silent,
    ):
        assert silent.recv(1) == b""
        monkeypatch.setattr(status, "REQUEST_SECONDS", 20)


def test_other_methods_and_paths(tmp_path: Path) -> None:
    with running(tmp_path, NOWHERE) as port:
        base = f"http://127.0.0.1:{port}"
        answer = httpx.post(f"{base}/health", trust_env=False)
        assert answer.status_code == 404
        assert answer.json() == {"error": "expected GET /health, found POST /health"}
        assert httpx.get(f"{base}/health?x=1", trust_env=False).status_code == 503
