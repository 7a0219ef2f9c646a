"""``status``: the same over HTTP."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from deploy.stages import follow
from deploy.stages.health import is_healthy
from deploy.stages.status import RESTART_SECONDS, Deployment, listen, tell_each
from deploy.state import (
    StageState,
    State,
    read_state,
    write_state,
)
from kt_kernel.errors import UserError
from kt_kernel.host.addresses import free_port
from tests.deploy.helpers import clean_environment, command, run
from tests.deploy.stage_states import as_of_another_container, other_process


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def status_server(deployment: Deployment) -> Iterator[Callable[[], tuple[int, str]]]:
    """Call it for the HTTP status of ``GET /health`` and the state in its answer."""
    with listen("127.0.0.1", 0, deployment) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"

        def ask() -> tuple[int, str]:
            answer = httpx.get(f"{address}/health", trust_env=False)
            return answer.status_code, answer.json()["state"]

        yield ask
        answer = httpx.get(f"{address}/metrics", trust_env=False)
        assert (answer.status_code, answer.json()) == (
            404,
            {"error": "expected GET /health, found /metrics"},
        )
        running.shutdown()
        thread.join()  # while its socket is open


def test_status_through_all_stages(tmp_path: Path, server: Callable[[int], str]) -> None:
    url = f"http://127.0.0.1:{server(503)}/health"
    clock = Clock()
    with status_server(Deployment(tmp_path, url, clock=clock)) as ask:
        assert ask() == (503, f"nothing has been started (no state in KT_RUN_DIR {tmp_path})")
        with other_process(tmp_path, "download", "asking the Hub"):
            as_of_another_container(tmp_path, "download")
            assert ask() == (503, "asking the Hub")
        # In a container it would be started again.
        ended = "the process ended without a word while asking the Hub"
        assert ask() == (503, f"restarting: {ended}: waiting whether it is started again")
        clock.now += RESTART_SECONDS
        assert ask()[1].startswith(f"failed: {ended}")
        state = StageState(tmp_path, "convert")
        with state.watch("converting", 58, lambda: 17, "layers"):
            assert ask() == (503, "converting 17 of 58 layers")
        state.set("done")
        assert ask() == (503, "convert finished")
        with other_process(tmp_path, "serve", "loading") as process:
            as_of_another_container(tmp_path, "serve")
            assert ask() == (503, "warming up")
            server(200)
            assert ask() == (200, "ready")
            # An `up` while it serves runs the earlier stages again.
            with other_process(tmp_path, "download", "verifying"):
                assert ask() == (200, "ready")
            write_state(tmp_path, State("download", "done", started=time.time()))
            process.kill()
            process.wait()
            # Whatever answers on the port now, it is not this server.
            assert ask()[1].startswith("restarting: the process ended without a word while ready")
            clock.now += RESTART_SECONDS
            assert ask()[1].startswith("failed: the process ended without a word while ready")


def test_status_of_servers_that_leave_no_state(
    tmp_path: Path, server: Callable[[int], str]
) -> None:
    url = f"http://127.0.0.1:{server(200)}/health"
    assert Deployment(tmp_path, url).overall() == State("serve", "ready")
    # One that served here before the servers elsewhere.
    write_state(tmp_path, State("serve", "ready"))
    elsewhere = Deployment(tmp_path, url, elsewhere=True).overall()
    here = Deployment(tmp_path, url).overall()
    assert elsewhere is not None
    assert is_healthy(elsewhere)
    assert here is not None
    assert not is_healthy(here)
    (tmp_path / "serve.json").unlink()
    write_state(tmp_path, State("convert", "failed", "no space"))
    failed = Deployment(tmp_path, url).overall()
    assert failed is not None
    assert failed.line() == "failed: no space"


def test_several_servers_are_counted(
    tmp_path: Path, router: Callable[[int, object], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The words and fields are those of sglang-router 0.3.2."""
    url = router(503, {"status": "not ready", "reason": "insufficient healthy workers"})
    deployment = Deployment(tmp_path, url, elsewhere=True, servers=2)
    state = StageState(tmp_path, "convert")
    state.set("converting")
    assert told(deployment) == ("converting", {"convert": "converting"})
    state.set("done")
    # One that served alone before.
    write_state(tmp_path, State("serve", "ready"))
    stages = {"convert": "finished", "serve": "loading 0 of 2 servers"}
    assert told(deployment) == ("loading 0 of 2 servers", stages)
    assert tell_each(deployment.report()) == 0
    assert capsys.readouterr().out == "convert: finished\nserve: loading 0 of 2 servers\n"
    router(200, {"status": "ready", "healthy_workers": 1, "total_workers": 1})
    assert told(deployment)[0] == "ready 1 of 2 servers"
    assert deployment.report()["healthy"]
    router(200, {"status": "ready", "healthy_workers": 2, "total_workers": 2})
    assert told(deployment)[0] == "ready"
    for strange in ([1], {"healthy_workers": "2"}, {"healthy_workers": None}):
        router(200, strange)
        assert told(deployment)[0] == "ready 1 of 2 servers"
    assert told(Deployment(tmp_path, "http://127.0.0.1:1", True, 2))[0] == "loading 0 of 2 servers"


def test_several_servers_that_all_failed(
    tmp_path: Path,
    router: Callable[[int, object], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`make up` ends with the reasons, as with one server; it followed for ever."""
    clock, url = Clock(), router(503, {"status": "not ready"})
    deployment = Deployment(tmp_path, url, elsewhere=True, servers=2, clock=clock)
    first, second = (tmp_path / "servers" / name for name in ("a", "b"))
    write_state(first, State("serve", "failed", "of an earlier time", started=1.0))
    write_state(tmp_path, State("check", "done", started=2.0))
    write_state(tmp_path, State("convert", "done", started=3.0))
    write_state(second, State("serve", "failed", "no card", started=4.0))
    assert told(deployment)[0] == "loading 0 of 2 servers"  # the first may begin anew
    with other_process(first, "serve", "loading") as process:
        as_of_another_container(first, "serve")
        assert told(deployment)[0] == "loading 0 of 2 servers"
        process.kill()
        process.wait()
        assert told(deployment)[0] == "loading 0 of 2 servers"  # it may be started again
        clock.now += RESTART_SECONDS
    reason = "all 2 servers: the process ended without a word while loading: "
    assert str(told(deployment)[0]).startswith(f"failed: {reason}")
    monkeypatch.setattr(follow, "FAILED_SECONDS", 0.0)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    assert follow.follow(deployment.report, follow._Lines(sys.stdout, 0)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"error: serve: {reason}")
    assert last.endswith("; no card")
    # The same reason is told once, and one server behind the router is no exception.
    write_state(first, State("serve", "failed", "no card", started=4.0))
    assert told(deployment)[0] == "failed: all 2 servers: no card"
    alone = Deployment(tmp_path, url, elsewhere=True)
    (first / "serve.json").unlink()
    assert told(alone)[0] == "failed: no card"
    router(200, {"healthy_workers": 1})
    assert told(deployment)[0] == "ready 1 of 2 servers"


def test_a_replaced_container_is_not_one_of_the_servers_that_failed(
    tmp_path: Path, router: Callable[[int, object], str]
) -> None:
    """What it left counted: with one failed server of two, `make up` ended with "all 2 servers"."""
    deployment = Deployment(tmp_path, router(503, {"status": "not ready"}), True, servers=2)
    old, second, new = (tmp_path / "servers" / name for name in ("old", "second", "new"))
    write_state(tmp_path, State("check", "done", started=1.0))
    write_state(old, State("serve", "failed", "no card", started=2.0))
    with other_process(second, "serve", "loading"):
        as_of_another_container(second, "serve")
        StageState(new, "serve").fail("no card")
        assert read_state(second, "serve") is not None  # it lives
    (second / "serve.json").unlink()
    assert told(deployment)[0] == "loading 0 of 2 servers"
    # When one is started again, what the others left stays: all of them may have failed.
    write_state(second, State("serve", "failed", "no memory", started=2.0))
    StageState(new, "serve").fail("no card")
    assert told(deployment)[0] == "failed: all 2 servers: no card; no memory"


def test_each_stage_says_why_it_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deployment = Deployment(tmp_path, "http://127.0.0.1:1/health")
    assert tell_each(deployment.report()) == 0
    assert capsys.readouterr().out.startswith("nothing has been started")
    write_state(tmp_path, State("check", "done", started=1.0))
    write_state(tmp_path, State("download", "failed", "HF_TOKEN is wrong", started=2.0))
    state = StageState(tmp_path, "convert")
    state.set("waiting", "download, which failed")
    assert tell_each(deployment.report()) == 1
    assert capsys.readouterr().out.splitlines() == [
        "check: finished",
        "download: failed: HF_TOKEN is wrong",
        "convert: waits for download, which failed",
    ]


def told(deployment: Deployment) -> tuple[object, object]:
    """What it is doing in all, and each stage of it."""
    report = deployment.report()
    return report["state"], report["stages"]


def test_status_ends_when_told_to_and_refuses_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = {"KT_RUN_DIR": str(tmp_path), "KT_HOST": "127.0.0.1", "KT_STATUS_PORT": port}
        settings["KT_PORT"] = str(free_port())  # a server on this machine is none of its business
        result = run("status", **settings)
        assert result.returncode == 2
        assert result.stderr.endswith(
            f"] error: cannot listen on KT_HOST 127.0.0.1, KT_STATUS_PORT {port}: Address already "
            f"in use: choose another port\n"
        )
    process = subprocess.Popen(
        command("status"), env=clean_environment(**settings), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert re.match(r"\[[-\d]+ [:\d]+\] status: GET /health on port ", line)
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_following_says_at_once_that_it_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a service it said nothing for a minute."""
    monkeypatch.setattr(follow, "UNREACHABLE_SECONDS", 0.0)
    port = free_port()
    with pytest.raises(UserError, match=f"no status service answers on KT_STATUS_PORT {port}"):
        follow.run("127.0.0.1", port, 1.0)
    waiting = f"waiting up to a minute for the status service on port {port} of 127.0.0.1\n"
    assert capsys.readouterr() == ("", waiting)
