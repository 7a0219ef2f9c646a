"""The router of several servers hears of those that come and go."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from deploy.router.endpoints import ServerList, addresses, follow, look

#: What a router might say to these addresses.
NO_ANSWERS = {"http://no-json": b"<p>", "http://no-id": b"{}", "http://no-object": b"[]"}


class FakeRouter(BaseHTTPRequestHandler):
    """As SGLang's router 0.3 answers; keeps what it was asked."""

    asked: list[tuple[str, str, object, str | None]] = []  # noqa: RUF012  (emptied by the fixture)

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        self.asked.append((self.command, self.path, body, self.headers["Authorization"]))
        url = body["url"] if body else ""
        self.send_response(400 if "refused" in url else 202)
        self.end_headers()
        answer = json.dumps({"worker_id": f"id-{len(self.asked)}"}).encode()
        self.wfile.write(NO_ANSWERS.get(url, answer))

    do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    FakeRouter.asked.clear()
    with HTTPServer(("127.0.0.1", 0), FakeRouter) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def follow_files(servers: ServerList, directory: Path) -> set[str]:
    found, problems = addresses(directory)
    return servers.follow(found) | problems


def test_servers_come_and_go(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    servers = ServerList(url, "control", "key")
    (tmp_path / "11").write_text("http://a:30000\n")
    (tmp_path / "12.tmp").write_text("http://b:30000\n")  # being written
    (tmp_path / "13").write_text("")
    for _ in range(2):
        assert follow_files(servers, tmp_path) == set()
    added = ("POST", "/workers", {"url": "http://a:30000", "api_key": "key"}, "Bearer control")
    assert FakeRouter.asked == [added]
    (tmp_path / "11").unlink()
    (tmp_path / "12.tmp").rename(tmp_path / "12")
    assert follow_files(servers, tmp_path) == set()
    assert [(how, path) for how, path, *_ in FakeRouter.asked[1:]] == [
        ("DELETE", "/workers/id-1"),
        ("POST", "/workers"),
    ]


def test_a_router_that_does_not_answer_yet_is_asked_again(url: str) -> None:
    servers = ServerList("http://127.0.0.1:9", "control", "")
    (problem,) = servers.follow({"http://a:30000", "http://b:30000"})
    assert "Connection refused" in problem
    servers._url = url
    assert servers.follow({"http://a:30000"}) == set()
    assert FakeRouter.asked == [("POST", "/workers", {"url": "http://a:30000"}, "Bearer control")]


@pytest.mark.timeout(30)  # a pipe that is read is waited for
def test_a_file_without_an_address_is_told_once_and_hides_no_other(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".node17.swp").write_bytes(b"http://swap\0\xff")
    (tmp_path / "node15").write_bytes(b"http://a\xff")
    (tmp_path / "node16").write_bytes(b"\xff\xfe")
    (tmp_path / "node17.cluster").write_text("http://node17.cluster:30000\n")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    servers = ServerList(url, "control", "")
    said: set[str] = set()
    for _ in range(2):
        said, _ = look(tmp_path, servers, said)
    assert [body for *_, body, _ in FakeRouter.asked] == [{"url": "http://node17.cluster:30000"}]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", found ")[0] for line in lines] == [
        f"warning: {tmp_path}/{name}: expected http://HOST:PORT" for name in ("node15", "node16")
    ]


def test_an_address_that_the_router_does_not_take_holds_up_no_other(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*NO_ANSWERS, "http://a-refused"]
    for number, address in enumerate([*bad, "http://z:30000"]):
        (tmp_path / str(number)).write_text(address)
    servers = ServerList(url, "control", "")
    said: set[str] = set()
    for _ in range(2):
        said, _ = look(tmp_path, servers, said)
    captured = capsys.readouterr()
    assert captured.out == "added http://z:30000\n"
    lines = captured.err.splitlines()
    assert len(lines) == len(bad)
    assert all(sum(repr(address) in line for line in lines) == 1 for address in bad)


def test_a_directory_that_comes_later_is_followed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = []

    def sleep(_: float) -> None:
        looks.append(len(FakeRouter.asked))
        if len(looks) == 2:
            (tmp_path / "later").mkdir()
            (tmp_path / "later" / "1").write_text("http://a:30000")
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path / "later", ServerList(url, "control", ""))
    assert looks == [0, 0, 1]
    assert capsys.readouterr().err == f"warning: {tmp_path}/later: No such file or directory\n"
