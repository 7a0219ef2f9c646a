"""HTTP servers that take as long as hosts of given speeds, in time that runs faster."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from aiohttp import web

from benchmarks.hosts.simulation import Host, Request
from benchmarks.hosts.speeds import Speeds

#: What SGLang tells the router of itself, as far as the router asks.
MODEL = {"model_path": "simulated", "served_model_name": "simulated", "is_generation": True}


class LiveHost:
    """One server: ``POST /v1/completions`` streams its first token, and its end.

    Args:
        speeds: of the host.
        most: requests that it computes together.
        prompt, answer: tokens of each request.
        scale: seconds that one simulated second takes.
    """

    def __init__(self, speeds: Speeds, most: int, prompt: int, answer: int, scale: float) -> None:
        self._host = Host(speeds, most)
        self._prompt, self._answer, self._scale = prompt, answer, scale
        self._told: dict[int, tuple[asyncio.Event, asyncio.Event]] = {}
        self._arrived = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/{path:.*}", self._tell)
        # The router tries HTTP/2 first, which aiohttp would complain of.
        quiet = logging.Logger("hosts", logging.CRITICAL)
        self._runner = web.AppRunner(app, access_log=None, logger=quiet, shutdown_timeout=0.01)
        self.requests = 0
        self.url = ""

    async def start(self) -> None:
        """Listen on a port of its own."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])
        self._work = asyncio.create_task(self._run())

    async def die(self) -> None:
        """Break off all connections and listen no more."""
        if self._work is not None:
            self._work.cancel()
            with suppress(asyncio.CancelledError):
                await self._work
            self._work = None
            await self._runner.cleanup()

    def _now(self) -> float:
        return time.monotonic() / self._scale

    async def _run(self) -> None:
        host = self._host
        while True:
            end = host.begin(self._now(), self._prompt)
            if end is None:
                await self._arrived.wait()
                self._arrived.clear()
                continue
            while (left := (end - self._now()) * self._scale) > 0:
                try:
                    await asyncio.wait_for(self._arrived.wait(), left)
                except TimeoutError:
                    break
                self._arrived.clear()
                end = host.interrupt(self._now()) or end
            prompt = host.prompt
            ended = host.finish(end)
            if prompt is not None:
                self._told[id(prompt)][0].set()
            for request in ended:
                self._told[id(request)][1].set()

    async def _complete(self, asked: web.Request) -> web.StreamResponse:
        self.requests += 1
        await asked.read()
        request = Request(0, self._now(), self._answer)
        first, end = self._told[id(request)] = asyncio.Event(), asyncio.Event()
        self._host.waiting.append(request)
        self._arrived.set()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await first.wait()
        await response.prepare(asked)
        await response.write(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
        await end.wait()
        del self._told[id(request)]
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _tell(self, _: web.Request) -> web.Response:
        return web.json_response(MODEL)
