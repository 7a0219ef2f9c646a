"""The stage ``status``: answers ``GET /health`` in every stage, also before the server listens.

It runs beside the stages, in a container of its own, and reads their state files.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, Self, cast

from deploy.console import say
from deploy.local_http import http_answer, http_status
from deploy.settings.config import Config
from deploy.settings.row import AUTO
from deploy.stages import follow
from deploy.stages.health import (
    ENDED,
    PIPELINE,
    base_host,
    examine,
    find_state,
    health_url,
    report_of,
)
from deploy.stages.stage import Stage
from deploy.stages.turns import CHECK
from deploy.state import (
    DONE,
    FAILED,
    READY,
    RESTARTING,
    SERVERS,
    STOPPED,
    State,
    read_state,
    run_directory,
)
from kt_kernel.errors import UserError, one_line

REQUEST_SECONDS = 10.0
"""For a client to send its request, and to take the answer."""
MOST_CONNECTIONS = 200
MOST_BYTES = 8192
"""Of a request."""
FOLLOW_SECONDS = 30.0  # between lines of progress
RESTART_SECONDS = 10.0
"""An engine starts a crashed container again within a second, and the stage soon tells so."""


def run(config: Config) -> NoReturn:
    """Serve until the process is told to end.

    Raises:
        UserError: the port cannot be listened on.
    """
    directory = run_directory(config["KT_RUN_DIR"])
    server = config.text("KT_STATUS_SERVER")
    url = health_url(config) if server == AUTO else server
    servers = config.integer("KT_STATUS_SERVERS")
    deployment = Deployment(directory, url, elsewhere=server != AUTO, servers=servers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = config.text("KT_HOST"), config.integer("KT_STATUS_PORT")
    with listen(host, port, deployment) as status:
        say(f"status: GET /health on port {status.server_port}; the states are in {directory}")
        status.serve_forever()
    raise AssertionError("unreachable")


def listen(host: str, port: int, deployment: Deployment) -> StatusServer:
    """A server that answers with what the deployment is doing.

    Raises:
        UserError: the port cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return StatusServer(socket.create_server((host, port), family=family), deployment.report)
    except OSError as error:
        # create_server adds the address to the words.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(
            f"cannot listen on KT_HOST {host}, KT_STATUS_PORT {port}: {reason}: choose another port"
        ) from None


class Deployment:
    """What the stages of a directory and their server are doing.

    Args:
        directory: where the states are.
        url: where the server says how it is.
        elsewhere: whether that is another server than the one whose state is in ``directory``.
        servers: how many there are; several are behind a router that counts those that are ready.
            Those of this host have their states in ``servers/*/`` of ``directory``.
        clock: seconds that pass.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        elsewhere: bool = False,
        servers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._url = directory, url
        self._elsewhere, self._servers, self._clock = elsewhere, servers, clock
        # When each process that is gone was first seen to be so.
        self._gone: dict[tuple[str, int, float], float] = {}

    def report(self) -> dict[str, object]:
        """What ``GET /health`` answers with."""
        overall = self.overall()
        report = report_of(overall, self._directory)
        report["stages"] = {
            name: state.line().removeprefix(f"{name} ") for name, state in self._each(overall)
        }
        return report

    def _each(self, overall: State | None) -> Iterator[tuple[str, State]]:
        for name in PIPELINE:
            if overall is not None and overall.stage == name:
                yield name, overall
            elif state := read_state(self._directory, name):
                yield name, self._examine(state)

    def overall(self) -> State | None:
        """Serving, if the server says so; else what the stages say.

        An `up` runs the earlier stages again while the server serves; serving is what counts then.
        """
        if self._servers > 1:
            return self._of_several()
        latest = find_state(self._directory, None)
        serve = read_state(self._directory, "serve")
        if serve is not None and serve.may_listen and serve.is_alive(self._directory):
            found = examine(serve, self._directory, self._url)
            if found.phase == READY:
                return found
        # Servers on other hosts leave no state here; one that served here before may have left its
        # own.
        is_idle = (
            latest is None or latest.phase == DONE or (self._elsewhere and latest.stage == "serve")
        )
        if (serve is None or self._elsewhere) and is_idle:
            status, words = http_status(self._url)
            if status == 200:
                return State("serve", words or READY)
            if self._elsewhere and (failed := self._failure_of_all()) is not None:
                return failed
        return None if latest is None else self._examine(latest)

    def _of_several(self) -> State | None:
        """Of servers behind a router; what one left here that served alone before is not theirs."""
        state = find_state(self._directory, None, but=("serve",))
        ready = ready_servers(self._url)
        if ready == 0 and state is not None and state.phase != DONE:
            return self._examine(state)
        if ready >= self._servers:
            return State("serve", READY)
        if ready == 0 and (failed := self._failure_of_all()) is not None:
            return failed
        phase = READY if ready else "loading"
        return State("serve", phase, done=ready, total=self._servers, unit="servers")

    def _failure_of_all(self) -> State | None:
        """Why the servers behind a router have failed, when as many as there are have for good.

        Of those in ``servers/*/``. What one was before the last check is over: the check has it
        begin anew, or its container has been replaced.
        """
        checked = read_state(self._directory, CHECK)
        reasons = []
        for directory in sorted(self._directory.glob(f"{SERVERS}/*")):
            state = read_state(directory, "serve")
            if state is None:
                continue
            if state.phase != FAILED and state.is_alive(directory):
                return None
            if checked is not None and state.started < checked.started:
                continue
            found = self._examine(state, directory)
            if found.phase not in (FAILED, STOPPED):
                return None
            reasons.append(found.message)
        if len(reasons) < self._servers:
            return None
        count = f"all {len(reasons)} servers: " if len(reasons) > 1 else ""
        return State("serve", FAILED, f"{count}{'; '.join(dict.fromkeys(reasons))}")

    def _examine(self, state: State, directory: Path | None = None) -> State:
        """As :func:`examine`; a process that is gone may be started again, in containers."""
        found = examine(state, directory or self._directory, self._url)
        if not found.message.startswith(ENDED) or state.phase == FAILED:
            return found
        now = self._clock()
        since = self._gone.setdefault((state.stage, state.pid, state.started), now)
        if now - since >= RESTART_SECONDS:
            return found
        words = f"{ENDED} while {state.line()}: waiting whether it is started again"
        return replace(found, phase=RESTARTING, message=words)


def ready_servers(url: str) -> int:
    """How many servers a router has that answer, by its ``GET /readiness``; one that does not count
    has one."""
    try:
        status, told = http_answer(url)
    except UserError:
        return 0
    count = told.get("healthy_workers")
    return (count if isinstance(count, int) else 1) if status == 200 else 0


def tell_each(report: Mapping[str, Any]) -> int:
    """Print a line for each stage; 1 if one has failed, else 0."""
    stages = report.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    if not stages:
        print(report.get("state"))
    for name, line in stages.items():
        print(f"{name}: {one_line(str(line))}")
    return 1 if report.get("phase") == FAILED else 0


class StatusServer:
    """Answers ``GET /health``: one thread, whatever connects.

    A client has some seconds to send its request, and when there are too many connections the
    oldest is closed. Requests that come while the answer is looked up share it.
    """

    def __init__(self, listening: socket.socket, report: Callable[[], dict[str, object]]) -> None:
        self._socket = listening
        self._report = report
        self._open: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._current: asyncio.Future[dict[str, object]] | None = None
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = threading.Event()
        self._ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def server_port(self) -> int:
        """Port that it listens on."""
        return int(self._socket.getsockname()[1])

    def serve_forever(self) -> None:
        """Answer until :meth:`shutdown`."""
        self._ended.clear()
        try:
            asyncio.run(self._serve())
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """End :meth:`serve_forever` from another thread, and return when nobody is answered."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stop.set)
        self._ended.wait()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with await asyncio.start_server(
            self._connection, sock=self._socket, limit=MOST_BYTES
        ):
            await self._stop.wait()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        if len(self._open) >= MOST_CONNECTIONS:
            next(iter(self._open)).cancel()
        self._open[task] = None
        # Clients go away, are too slow, or speak another language: none of it is worth a word.
        gone = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        with suppress(*gone, asyncio.CancelledError):
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            answer = await self._answer(head)
            async with asyncio.timeout(REQUEST_SECONDS):
                writer.write(answer)
                await writer.drain()
        del self._open[task]
        writer.close()

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.split(b"\r\n")[0].decode("latin-1").partition(" ")
        target = rest.partition(" ")[0]
        if method != "GET" or target.partition("?")[0] != "/health":
            found = target if method == "GET" else f"{method} {target}"
            return _response(404, {"error": f"expected GET /health, found {found}"})
        if self._current is None or self._current.done():
            self._current = asyncio.ensure_future(asyncio.to_thread(self._report))
        report = await asyncio.shield(self._current)
        serving = report.get("stage") == "serve" and report["healthy"]
        return _response(200 if serving else 503, report)


def _response(status: int, body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode() + b"\n"
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
    )
    return "\r\n".join([*head, "", ""]).encode() + content


def _add_arguments(parser: ArgumentParser) -> None:
    asking = parser.add_mutually_exclusive_group()
    asking.add_argument(
        "--follow",
        action="store_true",
        help="ask the `status` that runs, and print what it says until the server is ready or a "
        "stage has failed",
    )
    asking.add_argument(
        "--each",
        action="store_true",
        help="ask the `status` that runs, and print what each stage is doing, or why it failed",
    )


def _run(config: Config, follow_it: bool, each: bool) -> int:
    host, port = base_host(config), config.integer("KT_STATUS_PORT")
    if follow_it:
        return follow.run(host, port, FOLLOW_SECONDS)
    return tell_each(follow.ask(host, port)) if each else run(config)


STAGE = Stage(
    "status",
    "answer GET /health with what the stages are doing, until told to end",
    lambda config, args, _: _run(config, args.follow, args.each),
    _add_arguments,
    writes_log=lambda args: not (args.follow or args.each),
    any_settings=True,  # to tell which of them are wrong
)
