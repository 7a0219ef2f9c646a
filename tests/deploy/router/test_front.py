"""SGLang's router behind our edge, for real, before two servers that only pretend."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.router.__main__ import _at_end_of
from deploy.router.front import ROUTES, HandOn
from kt_kernel.host.addresses import free_port
from kt_kernel.sglang_plugin.edge.http import Message
from kt_kernel.sglang_plugin.edge.routes import Role

REPOSITORY = Path(__file__).parents[3]
USER_KEY, ADMIN_KEY = "sk-user", "sk-admin"
BREAKS_OFF = "break off"
"""To a request of this text a server dies in the middle of its answer."""


class Server(ThreadingHTTPServer):
    """Pretends to be SGLang; keeps who asked what, and with which key."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.left = threading.Event()
        self.status = 200
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"model_path": "/m", "served_model_name": "x"})

    def do_POST(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body.get("stream"):
            self._answer({"text": "b"}, self.server.status)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Access-Control-Allow-Origin", "*")
        if body["text"] == BREAKS_OFF:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"a\r\ndata: {}\n\n\r\n")
            self.close_connection = True
            return
        self.send_header("Connection", "close")
        self.end_headers()
        try:  # a token now and then, until nobody listens
            while True:
                self.wfile.write(b"data: {}\n\n")
                time.sleep(0.02)
        except OSError:
            self.server.left.set()
        self.close_connection = True

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Running:
    """The router, what it said, and the directory of its servers' addresses."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    endpoints: Path
    servers: list[Server] = field(default_factory=list)

    def ask(
        self, method: str, path: str, key: str | None = None, body: object = None, **headers: str
    ) -> httpx.Response:
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return httpx.request(
            method, self.url + path, json=body, headers=headers, timeout=30, trust_env=False
        )

    def wait_for_servers(self, count: int) -> None:
        def there() -> bool:
            try:
                answer = self.ask("GET", "/readiness")
            except httpx.TransportError:
                return False
            healthy = answer.json()["healthy_workers"] if answer.status_code == 200 else 0
            return bool(healthy == count)

        self.wait(f"{count} servers", there)

    def wait(self, what: str, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not there():
            assert time.monotonic() < deadline, f"{what}: {self.log.read_text()}"
            time.sleep(0.05)


def start(directory: Path, **variables: str) -> Running:
    """The router that follows ``directory``/endpoints."""
    endpoints, log, port = directory / "endpoints", directory / "log", str(free_port())
    endpoints.mkdir()
    environment = {"PATH": os.environ["PATH"], "KT_PORT": port, "ROUTER_POLICY": "round_robin"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.router", "--follow", str(endpoints)],
            cwd=REPOSITORY,
            env=environment | {"ROUTER_HEALTH_INTERVAL": "1"} | variables,
            stdout=output,
            stderr=output,
        )
    return Running(process, f"http://127.0.0.1:{port}", log, endpoints)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Before two servers."""
    directory = tmp_path_factory.mktemp("router")
    for name, key in (("user", USER_KEY), ("admin", ADMIN_KEY)):
        (directory / name).write_text(key + "\n")
    running = start(
        directory,
        KT_API_KEY_FILE=str(directory / "user"),
        KT_ADMIN_KEY_FILE=str(directory / "admin"),
        HTTP_PROXY="http://127.0.0.1:9",
    )
    try:
        for number in (1, 2):
            running.servers.append(Server())
            (running.endpoints / str(number)).write_text(running.servers[-1].url)
        running.wait_for_servers(2)
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)
        for server in running.servers:
            server.shutdown()
            server.server_close()


def test_no_key_is_on_a_command_line(router: Running) -> None:
    process = psutil.Process(router.process.pid)
    processes = [process, *process.children(recursive=True)]
    assert len(processes) == 2
    for each in processes:
        assert "sk-" not in " ".join(each.cmdline())
    assert "sk-" not in router.log.read_text()


def test_each_role_reaches_its_routes(router: Running) -> None:
    """The client's key opens what computes answers, the administrator's the list of servers."""
    for path, roles in ROUTES.routes.items():
        for method, role in roles.items():
            where = path.replace("{}", "x")
            told = {
                key: router.ask(method, where, key).status_code for key in (None, "wrong", USER_KEY)
            }
            if role is Role.ANYONE:
                assert set(told.values()) == {200}, (method, path, told)
                continue
            assert told[None] == told["wrong"] == 401, (method, path, told)
            assert (told[USER_KEY] == 403) == (role is Role.ADMIN), (method, path, told)
    listed = router.ask("GET", "/workers", ADMIN_KEY).json()["workers"]
    assert {server["url"] for server in listed} == {server.url for server in router.servers}


@pytest.mark.parametrize("path", ["/health", "/liveness", "/readiness"])
def test_load_balancers_may_ask_by_head(router: Running, path: str) -> None:
    answer = router.ask("HEAD", path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "path", ["/flush_cache", "/wasm", "/v1/tokenizers", "/v1/conversations", "/ha/shutdown"]
)
def test_what_else_the_router_would_answer_is_closed(router: Running, path: str) -> None:
    assert router.ask("POST", path, ADMIN_KEY, {}).status_code == 404


@pytest.mark.parametrize("path", ["/v1/responses/..%2f..%2fworkers", "/%77orkers", "//workers"])
def test_another_spelling_of_a_route_opens_nothing(router: Running, path: str) -> None:
    assert router.ask("GET", path, USER_KEY).status_code in (403, 404)


def test_servers_get_the_clients_key_whoever_asks(router: Running) -> None:
    before = [len(server.asked) for server in router.servers]
    for key in (USER_KEY, ADMIN_KEY) * 2:
        answer = router.ask("POST", "/generate", key, {"text": "a"})
        assert (answer.status_code, answer.json()) == (200, {"text": "b"})
    for server, earlier in zip(router.servers, before, strict=True):
        assert server.asked[earlier:] == [("/generate", f"Bearer {USER_KEY}")] * 2


def test_a_failure_is_not_asked_again_elsewhere(router: Running) -> None:
    before = sum(len(server.asked) for server in router.servers)
    for server in router.servers:
        server.status = 500
    try:
        assert router.ask("POST", "/generate", USER_KEY, {"text": "a"}).status_code == 500
    finally:
        for server in router.servers:
            server.status = 200
    assert sum(len(server.asked) for server in router.servers) == before + 1


def test_a_stream_comes_in_parts_and_ends_with_the_client(router: Running) -> None:
    """Else a server computes to the end for nobody."""
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream(
            "POST",
            router.url + "/generate",
            json={"text": "a", "stream": True},
            headers={"Authorization": f"Bearer {USER_KEY}", "Origin": "http://evil.example"},
        ) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == "data: {}"
        assert not [name for name in answer.headers if name.startswith("access-control")]
    router.wait("the end", lambda: any(server.left.is_set() for server in router.servers))


def test_an_answer_that_breaks_off_does_not_look_whole(router: Running) -> None:
    """Else a client takes half an answer for all of it."""
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        router.ask("POST", "/generate", USER_KEY, {"text": BREAKS_OFF, "stream": True})


def test_a_header_that_cannot_be_handed_on_is_the_clients_mistake(router: Running) -> None:
    before = router.log.read_text()
    answer = router.ask("GET", "/health", **{"X-Request-Id": "a\x01"})
    assert answer.status_code == 400
    expected = "the header x-request-id: found control characters, expected none"
    assert answer.json()["message"] == expected
    assert "Traceback" not in router.log.read_text()[len(before) :]


def test_a_body_that_is_too_long_is_refused(router: Running) -> None:
    headers = {"Authorization": f"Bearer {USER_KEY}"}
    answer = httpx.post(
        router.url + "/generate",
        content=b" " * ((64 << 20) + 1),
        headers=headers,
        timeout=30,
        trust_env=False,
    )
    assert answer.status_code == 413


def test_a_server_that_goes_is_left_out(router: Running) -> None:
    """Last: it takes one of the two away."""
    (router.endpoints / "2").unlink()
    router.wait_for_servers(1)


def test_pages_may_not_ask_a_router_without_keys_and_its_end_is_told(tmp_path: Path) -> None:
    running = start(tmp_path)
    try:
        running.wait("health", lambda: _answers(running))
        body = {"text": "a"}
        page = running.ask("POST", "/generate", None, body, Origin="http://evil.example")
        assert page.status_code == 403
        assert running.ask("POST", "/generate", None, body).status_code == 503  # no server
        assert running.ask("POST", "/workers", None, {"url": "http://a:1"}).status_code == 403
        (child,) = psutil.Process(running.process.pid).children()
        child.kill()
        assert running.process.wait(30) == 1
        assert "error: the router has ended by itself" in running.log.read_text().splitlines()
    finally:
        running.process.kill()


def test_the_end_of_the_router_is_told_once() -> None:
    """Else a core is busy until the requests under way have ended."""

    async def told() -> int:
        sentinel, other = os.pipe()
        calls: list[None] = []
        _at_end_of(sentinel, lambda: calls.append(None))
        os.close(other)
        for _ in range(20):
            await asyncio.sleep(0.001)
        os.close(sentinel)
        return len(calls)

    assert asyncio.run(told()) == 1


def test_a_request_arrives_with_the_headers_that_it_had() -> None:
    """UTF-8 as it came, and no ``Accept-Encoding`` that the client did not send."""
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def ask() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        messages: asyncio.Queue[Message] = asyncio.Queue()
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            app = HandOn(f"http://127.0.0.1:{port}", {Role.ANYONE: ""})
            messages.put_nowait({"type": "lifespan.startup"})
            living = asyncio.create_task(app({"type": "lifespan"}, messages.get, send))
            while not sent:
                await asyncio.sleep(0)
            request: asyncio.Queue[Message] = asyncio.Queue()
            request.put_nowait({"type": "http.request"})
            scope = {"type": "http", "method": "GET", "path": "/health", "query_string": b""}
            headers = [(b"x-user", "Zoë".encode())]
            await app({**scope, "headers": headers}, request.get, send)
            messages.put_nowait({"type": "lifespan.shutdown"})
            await living
        return sent

    assert [message.get("status") for message in asyncio.run(ask())][1] == 200
    lines = bytes(received).split(b"\r\n")
    assert "x-user: Zoë".encode() in lines
    assert not [line for line in lines if line.lower().startswith(b"accept")]


def _answers(running: Running) -> bool:
    try:
        return running.ask("GET", "/health").status_code == 200
    except httpx.TransportError:
        return False


def test_the_router_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """Killed, or told to end: no process is left."""
    for end in ("terminate", "kill"):
        (tmp_path / end).mkdir()
        running = start(tmp_path / end)
        running.wait("health", lambda running=running: _answers(running))  # type: ignore[misc]
        (child,) = psutil.Process(running.process.pid).children()
        getattr(running.process, end)()
        assert running.process.wait(30) == (0 if end == "terminate" else -9)
        running.wait("its end", lambda child=child: not child.is_running())  # type: ignore[misc]
