"""``entrypoint.py serve`` starts stock SGLang, ``smoke`` talks to it, and no request ends it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.server import Server, group_members
from deploy.copies.weight_cache import is_held
from examples.tiny.demo import what_ran
from examples.tiny.trained import CHECKPOINT
from kt_kernel.sglang_plugin.edge.kinds import Limits
from tests.deploy.helpers import command, fails, run
from tests.sglang_plugin.edge import live

TOTAL_TOKENS = 1500


@contextmanager
def stopped(server: Server, title: str) -> Iterator[None]:
    """The server's process with this title stands still for the block."""
    (process,) = [
        member
        for member in group_members(server._process.pid)
        if Path(f"/proc/{member}/cmdline").read_bytes().startswith(title.encode())
    ]
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.serve
def test_serve_and_smoke(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-test\n")
    weights = tmp_path / "int4"
    settings = {
        "KT_MODEL_PATH": str(CHECKPOINT),
        "KT_WEIGHT_PATH": str(weights),
        "KT_WEIGHT_CACHE": str(tmp_path / "local"),
        "KT_DEVICE": "cpu",
        "KT_API_KEY_FILE": str(tmp_path / "key"),
        "KT_RUN_DIR": str(tmp_path / "run"),
        # For the download; the server would warm up through it, the smoke test ask through it.
        "HTTP_PROXY": "http://127.0.0.1:9",
        "all_proxy": "http://127.0.0.1:9",
        "HF_TOKEN": "hf_secret",
        # A prompt that fills the memory is soon computed.
        "KT_MAX_TOTAL_TOKENS": str(TOTAL_TOKENS),
    }
    assert run("convert", **settings).returncode == 0
    with Server(settings, tmp_path / "log", command("serve")) as server:
        settings |= {"KT_HOST": "127.0.0.1", "KT_PORT": str(server.port)}
        # The process became the server, so signals of a container's engine reach it directly.
        words = Path(f"/proc/{server._process.pid}/cmdline").read_bytes().split(b"\0")
        assert words[1:3] == [b"-m", b"sglang.launch_server"]
        loaded = Path(words[words.index(b"--kt-weight-path") + 1].decode())
        assert loaded.parent == tmp_path / "local"
        assert is_held(loaded)  # from any other server that needs room
        variables = Path(f"/proc/{server._process.pid}/environ").read_bytes().upper()
        assert b"_PROXY=" not in variables
        assert b"HF_TOKEN=" not in variables

        # The API key is not for /health; the state is asked of the running server.
        assert run("health", **settings).stdout == "ready\n"
        health = f"http://127.0.0.1:{server.port}/health"
        # SGLang's probe would generate a token, which a scheduler at work on a long prompt cannot.
        with stopped(server, "sglang::scheduler"):
            assert httpx.get(health, timeout=30, trust_env=False).status_code == 200
        # Who pauses it is told so by everyone who asks; it lives all the same.
        pause = f"http://127.0.0.1:{server.port}/pause_generation"
        httpx.post(pause, json={}, headers=server.admin, trust_env=False).raise_for_status()
        paused = "paused by the administrator, with 0 requests running"
        assert (
            run("health", **settings).stdout,
            httpx.get(health, trust_env=False).status_code,
        ) == (
            f"{paused}\n",
            200,
        )
        assert (
            httpx.get(f"http://127.0.0.1:{server.port}/ready", trust_env=False).json()["state"]
            == paused
        )
        go_on = pause.replace("pause", "continue")
        httpx.post(go_on, json={}, headers=server.admin, trust_env=False).raise_for_status()
        assert run("health", **settings).stdout == "ready\n"

        # What the demo reads in the log; one of 16 experts of a layer is resident.
        assert "45 experts in 3 layers" in what_ran(tmp_path / "log", weights)

        result = run("smoke", **settings)
        assert result.returncode == 0, result
        # Sampled with the checkpoint's own defaults, so of the answer only its start is certain.
        assert "streamed answer: 'H" in result.stdout
        without_key = {k: v for k, v in settings.items() if k != "KT_API_KEY_FILE"}
        assert "HTTP 401" in fails("smoke", **without_key)
        key = {"Authorization": "Bearer sk-test"}
        base = f"http://127.0.0.1:{server.port}"
        for path, text in (("metrics", "sglang:"), ("health_generate", "")):
            answer = httpx.get(f"{base}/{path}", headers=key, timeout=60, trust_env=False)
            assert answer.status_code == 200
            assert text in answer.text
        processes = [Path(f"/proc/{one}/cmdline") for one in group_members(server._process.pid)]
        told = [tmp_path / "log", *(tmp_path / "run").glob("*.json"), *processes]
        live.check_access(base, "sk-test", server.admin_key, told)
        # A connection for each request: SGLang closes the one on which it answered 500.
        once = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(
            base_url=base, headers=server.admin, timeout=120, limits=once, trust_env=False
        ) as client:
            context = live.check_context(client, TOTAL_TOKENS)
            config = json.loads((CHECKPOINT / "config.json").read_text())
            limits = Limits(config["vocab_size"], context, config["hidden_size"])
            live.check_mistakes(client)
            live.check_survives(client, limits)

        refused = fails("serve", **settings)
        assert f"expected port {server.port} on 127.0.0.1 to be free" in refused
        assert run("health", **settings).stdout == "ready\n"  # of the one that runs
    ended = run("health", **settings)
    assert ended.returncode == 1
    assert ended.stdout == "stopped: the server was told to end\n"
