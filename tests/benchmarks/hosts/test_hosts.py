"""Hosts on paper: the simulation, its table in the documents, the servers behind the router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.hosts import __main__ as command
from benchmarks.hosts import router
from benchmarks.hosts.servers import LiveHost
from benchmarks.hosts.simulation import (
    BALANCE_ABSOLUTE,
    BALANCE_RELATIVE,
    Load,
    choose,
    simulate,
)
from benchmarks.hosts.speeds import PUBLISHED, Speeds, read_speeds
from benchmarks.server import REPOSITORY

REHEARSAL = REPOSITORY / "docs/performance/rehearsal-h200-int4.json"


def test_the_table_is_that_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + len(command.USERS) * len(command.TALKS)
    assert table in (REPOSITORY / "docs/clusters.md").read_text()


def test_one_user_waits_for_nobody() -> None:
    """What a host does alone follows from its speeds, without a simulation."""
    speeds = Speeds({1: 0.5}, {100: 3.0})
    answered = simulate(Load(1, 100, 11), [speeds], most=4)
    assert len(answered) > 20
    for request in answered:
        assert request.first - request.asked == pytest.approx(3.0)
        assert request.end - request.first == pytest.approx(10 * 0.5)


def test_two_at_once_share_the_steps() -> None:
    """The second prompt holds the first answer up, and comes after the step under way."""
    speeds = Speeds({1: 1.0, 2: 1.5}, {100: 4.0})
    answered = simulate(Load(2, 100, 9, pause=1e-9), [speeds], most=2, seconds=300.0)
    assert len(answered) > 10
    # Eight more tokens, alone or together, and the other's prompt once; alone it would be 8 s.
    for request in answered:
        assert 4 + 8 * 1.0 <= request.end - request.first <= 4 + 8 * 1.5
        assert 4 <= request.first - request.asked <= 2 * 4 + 1.5


def test_no_more_than_a_host_computes_together() -> None:
    """The third waits for one of two to end, not for its prompt alone."""
    speeds = Speeds({1: 1.0}, {1: 1.0})
    asked = simulate(Load(3, 1, 50, pause=1e-9), [speeds], most=2, seconds=300.0)
    assert max(request.first - request.asked for request in asked) > 40


def test_more_hosts_take_more_users() -> None:
    load = Load(30, 2000, 200)
    waits = [command.first_token(simulate(load, [PUBLISHED] * n, 8)) for n in (1, 2, 4, 8)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 2 * waits[-1]


def test_the_choice_is_the_routers() -> None:
    """A conversation stays, until its host has too many requests more than the idlest."""
    assert choose([3, 1, 2], None) == 1
    assert choose([BALANCE_ABSOLUTE, 0], 0) == 0
    assert choose([BALANCE_ABSOLUTE + 1, 0], 0) == 1
    busy = 20
    assert choose([int(busy * BALANCE_RELATIVE), busy], 0) == 0
    assert choose([int(busy * BALANCE_RELATIVE) + 1, busy], 0) == 1


def test_speeds_of_a_rehearsal(tmp_path: Path) -> None:
    speeds = read_speeds(REHEARSAL)
    for requests in (1, 8):
        assert speeds.step(requests) == pytest.approx(PUBLISHED.step(requests), 1e-2)
    assert speeds.prompt(4096) == pytest.approx(20.3, 1e-2)
    between = speeds.prompt(2304)
    assert between == pytest.approx((speeds.prompt(512) + speeds.prompt(4096)) / 2)
    assert speeds.prompt(8192) > speeds.prompt(4096)
    for text, error in (
        ("{", "is not valid JSON"),
        ("{}", "expected the JSON of `make rehearsal`, found another"),
        (json.dumps({"kind": "rehearsal", "fits": {"decode": {}, "prefill": {}}}), "several"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(BenchmarkError, match=error):
            read_speeds(tmp_path / "other.json")


def test_what_no_number_of_hosts_does_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--target", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 64 hosts give 1 users no first token after 1 s and 3 tokens/s")
    assert said.count("\n") == 1


def on_hosts(work: Callable[[list[LiveHost], aiohttp.ClientSession], object]) -> object:
    """Do something with two live hosts, a hundred times as fast as the published ones."""

    async def run() -> object:
        hosts = [LiveHost(PUBLISHED, 4, 500, 20, 0.01) for _ in range(2)]
        for host in hosts:
            await host.start()
        try:
            async with aiohttp.ClientSession(trust_env=False) as session:
                return await work(hosts, session)  # type: ignore[misc]
        finally:
            for host in hosts:
                await host.die()

    return asyncio.run(run())


def test_clients_of_a_host_that_dies() -> None:
    """They count what it breaks off and what it refuses, and the other host's answers."""

    async def work(hosts: list[LiveHost], session: aiohttp.ClientSession) -> None:
        load = Load(4, 500, 20, pause=5.0)
        both = [router.ask_for(host.url, load, 60.0, 0.01, session) for host in hosts]
        asking = asyncio.gather(*both)
        while not hosts[1].requests:
            await asyncio.sleep(0.005)
        await hosts[1].die()
        alive, dead = await asking
        assert (alive.failed, dead.failed > 0) == (0, True)
        assert len(alive.answered) == hosts[0].requests > 0
        assert all(r.asked < r.first < r.end for r in alive.answered)

    on_hosts(work)


def test_the_real_router_leaves_out_the_host_that_dies() -> None:
    """All others get requests, the slow one too; what failed is soon no more."""
    outcome, requests = asyncio.run(router.measure(seconds=200.0, scale=0.02))
    assert all(count > 0 for count in requests)
    assert len(outcome.answered) + outcome.failed >= sum(requests)
    # Asked on and on, it would have failed for five users every two seconds.
    assert 0 < outcome.failed < 60


def test_a_router_that_does_not_start_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTER_POLICY", "fastest")
    assert router.main(["--seconds", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the router ended with status 2: error: ROUTER_POLICY: expected")
    assert said.count("\n") == 1
