"""SGLang's real router before four simulated hosts: ``python -m benchmarks.hosts.router``.

One of them is half as fast, and one dies in the middle. The router runs as in the deployment,
``python -m deploy.router``, but looks more often whether a server lives. Seconds are simulated ones
unless they are called real.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import aiohttp

from benchmarks.errors import BenchmarkError
from benchmarks.hosts.__main__ import first_token
from benchmarks.hosts.servers import LiveHost
from benchmarks.hosts.simulation import Load, Request, simulate
from benchmarks.hosts.speeds import PUBLISHED, Speeds
from benchmarks.markdown import table
from benchmarks.server import end_with_parent
from deploy.settings.tutorial import REQUESTS
from kt_kernel.errors import one_line
from kt_kernel.host.addresses import free_port

#: Opens the router's list of servers.
KEY = "simulated"
ADMIN = {"Authorization": f"Bearer {KEY}"}
START_SECONDS = 60.0
#: Before a client repeats what failed, in simulated seconds.
REPEAT = 2.0
SLOW = 2.0
LOAD = Load(users=20, prompt=500, answer=300)


def slower(speeds: Speeds, factor: float) -> Speeds:
    """A host that takes so many times as long."""
    return Speeds(
        {n: factor * seconds for n, seconds in speeds.decode.items()},
        {n: factor * seconds for n, seconds in speeds.prefill.items()},
    )


@dataclass
class Outcome:
    """What the clients saw."""

    answered: list[Request] = field(default_factory=list)
    failed: int = 0


async def ask_for(
    url: str, load: Load, seconds: float, scale: float, session: aiohttp.ClientSession
) -> Outcome:
    """All users ask ``url`` for so many simulated seconds."""
    outcome = Outcome()
    until = time.monotonic() + seconds * scale

    async def user(number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.uniform(0, load.pause) * scale)
        while time.monotonic() < until:
            body = {"model": "simulated", "prompt": f"user {number} " * 50, "stream": True}
            request = Request(number, time.monotonic() / scale, 0)
            try:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    await answer.content.readuntil(b"\n\n")
                    request.first = time.monotonic() / scale
                    if b"[DONE]" not in await answer.content.read():
                        raise aiohttp.ClientPayloadError("it ends in the middle")
            except (aiohttp.ClientError, asyncio.IncompleteReadError):
                outcome.failed += 1
                await asyncio.sleep(REPEAT * scale)
                continue
            request.end = time.monotonic() / scale
            outcome.answered.append(request)
            await asyncio.sleep(rng.expovariate(1 / load.pause) * scale)

    await asyncio.gather(*(user(number) for number in range(load.users)))
    return outcome


async def measure(seconds: float, scale: float) -> tuple[Outcome, list[int]]:
    """Router and hosts; what the clients saw, and the requests of each host.

    Raises:
        BenchmarkError: the router does not start.
    """
    speeds = [PUBLISHED, PUBLISHED, slower(PUBLISHED, SLOW), PUBLISHED]
    hosts = [LiveHost(s, REQUESTS, LOAD.prompt, LOAD.answer, scale) for s in speeds]
    for host in hosts:
        await host.start()
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KT_")}
    environment |= {
        "WORKER_URLS": " ".join(host.url for host in hosts),
        "KT_HOST": "127.0.0.1",
        "KT_PORT": str(port),
        "KT_ADMIN_KEY": KEY,
        "ROUTER_HEALTH_INTERVAL": "1",
    }
    url = f"http://127.0.0.1:{port}"
    try:
        # What the router says of the host that dies is to be expected.
        with tempfile.TemporaryFile() as log, _started(environment, log) as router:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), trust_env=False
            ) as session:
                await _ready(url, router, session, log)
                asking = asyncio.create_task(ask_for(url, LOAD, seconds, scale, session))
                await asyncio.sleep(seconds * scale / 2)
                await hosts[-1].die()
                return await asking, [host.requests for host in hosts]
    finally:
        for host in hosts:
            await host.die()


@contextmanager
def _started(environment: dict[str, str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    router = subprocess.Popen(
        [sys.executable, "-m", "deploy.router"],
        env=environment,
        stdout=log,
        stderr=log,
        preexec_fn=end_with_parent(),
    )
    try:
        yield router
    finally:
        router.terminate()
        router.wait()


async def _ready(
    url: str, router: subprocess.Popen[bytes], session: aiohttp.ClientSession, log: IO[bytes]
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if router.poll() is not None:
            log.seek(0)
            said = one_line(log.read()[-500:].decode(errors="replace").strip())
            raise BenchmarkError(f"the router ended with status {router.returncode}: {said}")
        try:
            async with session.get(f"{url}/workers", headers=ADMIN) as answer:
                found = await answer.json()
            if sum(worker["is_healthy"] for worker in found["workers"]) == 4:
                return
        except (aiohttp.ClientError, KeyError):
            pass
        await asyncio.sleep(0.2)
    raise BenchmarkError(f"the router knows no four servers after {START_SECONDS:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the router did beside what the simulation says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts.router", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0, help="simulated")
    parser.add_argument(
        "--scale", type=float, default=1 / 40, help="real seconds of a simulated one"
    )
    args = parser.parse_args(argv)
    try:
        outcome, requests = asyncio.run(measure(args.seconds, args.scale))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    speeds = [PUBLISHED, PUBLISHED, slower(PUBLISHED, SLOW)]
    rows = [
        _row("router, 4 hosts of which one dies", outcome.answered, str(outcome.failed)),
        _row("simulated, 4 hosts", simulate(LOAD, [*speeds, PUBLISHED], REQUESTS), "0"),
        _row("simulated, the 3 that stay", simulate(LOAD, speeds, REQUESTS), "0"),
    ]
    head = ("", "answered", "failed", "first token, median", "95%", "whole answer, median")
    print("\n".join(table(head, rows)))
    print(f"requests of each host, the third slow, the fourth dies: {requests}")
    return 0


def _row(name: str, answered: Sequence[Request], failed: str) -> list[str]:
    whole = sorted(request.end - request.asked for request in answered)
    figures = (first_token(answered, 0.5), first_token(answered), whole[len(whole) // 2])
    return [name, str(len(answered)), failed, *(f"{figure:.1f} s" for figure in figures)]


if __name__ == "__main__":
    sys.exit(main())
