"""What a server says of itself, while it serves and while it does not."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kt_kernel.load_progress import PROGRESS_VARIABLE
from kt_kernel.sglang_plugin.edge import health
from kt_kernel.sglang_plugin.edge.health import Health, log_no_probes
from kt_kernel.sglang_plugin.edge.http import Message
from kt_kernel.sglang_plugin.edge.routes import Role, methods_of

UP, STARTING = SimpleNamespace(name="Up"), SimpleNamespace(name="Starting")


class Server:
    """A ``Health`` before an application whose requests run for as long as the test wants."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.manager = SimpleNamespace(
            last_receive_tstamp=0.0, gracefully_exit=False, is_pause=False, server_status=UP
        )
        self.ends: list[asyncio.Event] = []
        self.health = Health(self._application, self.manager, lambda: self.now)

    async def _application(self, scope: Message, receive: Any, send: Any) -> None:
        self.ends.append(asyncio.Event())
        await self.ends[-1].wait()
        if scope.get("raises"):
            raise RuntimeError("the client went")

    async def begin(self, route: str, **scope: Any) -> asyncio.Task[Any]:
        """A request that has come as far as the application."""
        method, path = route.split()
        asked = {"type": "http", "method": method, "path": path, **scope}

        async def run() -> None:
            await self.health(asked, None, None)  # type: ignore[arg-type]

        task = asyncio.create_task(run())
        await asyncio.sleep(0)
        return task

    async def sent(self, method: str, path: str) -> list[Message]:
        """The answer as it is sent: its start, its body."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await self.health({"type": "http", "method": method, "path": path}, None, send)  # type: ignore[arg-type]
        return sent

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        start, body = await self.sent("GET", path)
        return start["status"], json.loads(body["body"])


@pytest.fixture(autouse=True)
def _no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)


def test_a_server_that_gets_no_further_says_so() -> None:
    async def life() -> None:
        server = Server()
        server.manager.last_receive_tstamp = 10.0  # an idle server's newest token is old
        assert await server.get("/ready") == (
            200,
            {"state": "ready", "running": 0, "silent_seconds": 0.0},
        )
        tasks = [await server.begin("POST /generate") for _ in range(3)]
        server.now += health.STUCK_SECONDS
        assert (await server.get("/ready"))[1]["state"] == "ready"
        server.now += 1
        expected = "stuck: no token for 301 s with 3 requests running"
        assert await server.get("/ready") == (
            503,
            {"state": expected, "running": 3, "silent_seconds": 301.0},
        )
        status, told = await server.get("/health")  # it lives
        assert (status, told["state"]) == (200, expected)
        # A token of any of them.
        server.manager.last_receive_tstamp = server.now - 5
        assert (await server.get("/ready"))[1]["silent_seconds"] == 5.0
        for end in server.ends:
            end.set()
        await asyncio.gather(*tasks)
        server.now += 10_000
        assert (await server.get("/ready"))[0] == 200

    asyncio.run(life())


def test_a_prompt_gives_no_token_but_ends_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "serve-layers.json"))
    monkeypatch.setattr(health, "_told", 0.0)

    async def life() -> None:
        server = Server()
        await server.begin("POST /v1/chat/completions")
        server.now += health.STUCK_SECONDS + 100
        assert (await server.get("/ready"))[0] == 503
        health.tell_batch("result", "scheduler", "batch", pp_proxy_tensors=None)
        (file,) = tmp_path.iterdir()
        os.utime(file, (0, server.now - 50))
        assert await server.get("/ready") == (
            200,
            {"state": "ready", "running": 1, "silent_seconds": 50.0},
        )
        server.ends[0].set()

    asyncio.run(life())


def test_telling_batches_costs_nothing_and_fails_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health.tell_batch(None, None)
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "no" / "serve-layers.json"))
    monkeypatch.setattr(health, "_told", 0.0)
    health.tell_batch(None, None)
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "serve-layers.json"))
    health.tell_batch(None, None)  # within the same second
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "state", "lives"),
    [
        ({"server_status": STARTING}, "warming up", False),
        ({"gracefully_exit": True}, "ending", False),
        ({"is_pause": True}, "paused by the administrator, with 0 requests running", True),
    ],
)
def test_other_states(fields: dict[str, Any], state: str, lives: bool) -> None:
    async def life() -> None:
        server = Server()
        vars(server.manager).update(fields)
        assert (await server.get("/ready"))[0] == 503
        for path in ("/health", "/ping"):
            status, told = await server.get(path)
            assert (status, told["state"]) == (200 if lives else 503, state)

    asyncio.run(life())


def test_a_load_balancer_may_ask_by_head() -> None:
    """It was told 405, and took the server out."""

    async def life() -> None:
        server = Server()
        for path in ("/health", "/ready", "/ping"):
            start, body = await server.sent("HEAD", path)
            whole, _ = await server.sent("GET", path)
            assert (start, body["body"]) == (whole, b"")
            assert methods_of(path)["HEAD"] is Role.ANYONE

    asyncio.run(life())


def test_what_is_counted() -> None:
    """Requests for answers, until they end, however they end."""

    async def life() -> None:
        server = Server()
        await server.begin("POST /flush_cache")
        await server.begin("GET /v1/models")
        await server.begin("POST /of/tomorrow")
        failing = await server.begin("POST /generate", raises=True)
        gone = await server.begin("POST /generate")
        assert server.health.report()["running"] == 2
        server.ends[3].set()
        gone.cancel()
        found = await asyncio.gather(failing, gone, return_exceptions=True)
        assert [type(one) for one in found] == [RuntimeError, asyncio.CancelledError]
        assert server.health.report()["running"] == 0
        for end in server.ends:
            end.set()

    asyncio.run(life())


def test_probes_that_are_answered_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A line every few seconds hid what users ask for."""
    access = logging.getLogger("uvicorn.access")
    caplog.set_level(logging.INFO, access.name)
    log_no_probes()
    log_no_probes()
    assert len(access.filters) == 1
    for path, status in (("/health", 200), ("/health", 503), ("/metrics?a", 200), ("/x", 200)):
        access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", path, "1.1", status)
    access.info("something else")
    access.filters.clear()
    assert [record.getMessage().partition(' "')[2] for record in caplog.records] == [
        'GET /health HTTP/1.1" 503',
        'GET /x HTTP/1.1" 200',
        "",
    ]
