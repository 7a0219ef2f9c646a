"""How the server is, told without computing anything: what is in flight, how old progress is.

``/health`` says 200 for as long as the process lives, so that nothing restarts a server that has
338 GB to load again; ``/ready`` says 200 only when a request would be answered. Both say why.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kt_kernel.load_progress import PROGRESS_VARIABLE
from kt_kernel.sglang_plugin.edge.http import Application, Message, Receive, Send
from kt_kernel.sglang_plugin.edge.routes import Role, methods_of

STUCK_SECONDS = 300.0
"""Without a token and without a batch, although requests wait: no batch takes that long."""

READY = "ready"
WARMING_UP = "warming up"
_PATHS = ("/health", "/ready", "/ping")
#: What asks every few seconds: health checks and Prometheus.
_PROBED = (*_PATHS, "/metrics")


class Health:
    """ASGI middleware: answers for the server's health, and knows which requests run."""

    def __init__(
        self, app: Application, manager: Any, clock: Callable[[], float] = time.time
    ) -> None:
        """``manager`` is SGLang's ``TokenizerManager``; ``clock`` the one of its time stamps."""
        self._app = app
        self._manager = manager
        self._clock = clock
        self._running: dict[int, float] = {}  # when each began, the oldest first

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope.get("path"), scope.get("method")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif method in ("GET", "HEAD") and path in _PATHS:
            await self._answer(str(path), str(method), send)
        elif method == "GET" or methods_of(str(path)).get(str(method)) is not Role.USER:
            await self._app(scope, receive, send)
        else:
            request = id(scope)
            self._running[request] = self._clock()
            try:
                await self._app(scope, receive, send)
            finally:
                del self._running[request]

    def report(self) -> dict[str, object]:
        """``state`` in words, ``running`` requests, ``silent_seconds`` since they last moved."""
        now, oldest = self._clock(), list(self._running.values())[:1]
        moved = [self._manager.last_receive_tstamp, *oldest, _last_batch()]
        silent = max(now - max(moved), 0.0) if self._running else 0.0
        running = len(self._running)
        return {
            "state": self._state(running, silent),
            "running": running,
            "silent_seconds": round(silent, 1),
        }

    def _state(self, running: int, silent: float) -> str:
        manager, requests = self._manager, f"{running} request{'' if running == 1 else 's'}"
        if manager.gracefully_exit:
            return "ending"
        if manager.server_status.name == "Starting":
            return WARMING_UP
        if manager.is_pause:
            return f"paused by the administrator, with {requests} running"
        if silent > STUCK_SECONDS:
            return f"stuck: no token for {silent:.0f} s with {requests} running"
        return READY

    async def _answer(self, path: str, method: str, send: Send) -> None:
        report = self.report()
        lives = report["state"] not in ("ending", WARMING_UP)
        good = report["state"] == READY if path == "/ready" else lives
        body = json.dumps(report).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        start = {"type": "http.response.start", "status": 200 if good else 503, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


def log_no_probes() -> None:
    """Leave good answers to health checks and Prometheus out of uvicorn's access log."""
    access = logging.getLogger("uvicorn.access")
    if _is_worth_a_line not in access.filters:
        access.addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    # What uvicorn formats: client, method, path with query, HTTP version, status.
    args = record.args
    if not isinstance(args, tuple) or len(args) != 5:
        return True
    return args[4] != 200 or str(args[2]).partition("?")[0] not in _PROBED


# ---- batches, which end in the scheduler's process ----------------------------------------------


def _batch_file() -> Path | None:
    """Whose time of change is that of the newest batch; None where nobody named a directory."""
    name = os.environ.get(PROGRESS_VARIABLE)
    return Path(name).with_name("serve-batch") if name else None


def _last_batch() -> float:
    path = _batch_file()
    if path is not None:
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


_told = 0.0


def tell_batch(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """After ``Scheduler.run_batch``: say once a second that batches end, also those of a prompt.

    A long prompt gives no token for minutes. Best effort: no batch fails because of this.
    """
    global _told
    path, now = _batch_file(), time.monotonic()
    if path is not None and now - _told > 1:
        _told = now
        with suppress(OSError):
            path.touch()
