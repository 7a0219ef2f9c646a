"""What SGLang's router is started with, and mistakes before it is."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from sglang_router.launch_router import parse_router_args
from sglang_router.router_args import RouterArgs

from benchmarks.server import REPOSITORY
from deploy.router.__main__ import main
from deploy.router.options import POLICIES, router_options, server_urls


def test_servers() -> None:
    project = {"REPLICAS": "2", "PROJECT": "p", "KT_PORT": "31000"}
    assert server_urls(project) == ["http://p-serve-1:31000", "http://p-serve-2:31000"]
    assert server_urls({"PROJECT": "p"})[-1] == "http://p-serve-2:30000"
    named = {**project, "WORKER_URLS": "http://a:1 https://b:2"}
    assert server_urls(named) == ["http://a:1", "https://b:2"]


def test_the_router_knows_these_options() -> None:
    options = router_options({"ROUTER_POLICY": "round_robin", "ROUTER_BALANCE": ""})
    args = RouterArgs(**options)
    assert (args.policy, args.balance_abs_threshold) == ("round_robin", 4)
    for policy in POLICIES:
        assert parse_router_args(["--policy", policy]).policy == policy


def test_a_request_that_ended_a_server_is_not_sent_to_the_next() -> None:
    assert RouterArgs(**router_options({})).disable_retries


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORKER_URLS": "a:1"}, "expected addresses like http://host:30000, found a:1"),
        ({"WORKER_URLS": ""}, "expected servers"),
        ({"ROUTER_POLICY": "best"}, "ROUTER_POLICY: expected cache_aware, "),
        ({"ROUTER_BALANCE": "-1"}, "ROUTER_BALANCE: expected a number from 1, found -1"),
        ({"KT_API_KEY": "a", "KT_API_KEY_FILE": "/b"}, "both KT_API_KEY and KT_API_KEY_FILE"),
        ({"KT_API_KEY_FILE": "/no/such"}, "KT_API_KEY_FILE: cannot read /no/such"),
        ({"KT_PUBLISHED_HOST": "0.0.0.0"}, "found no key and KT_PUBLISHED_HOST 0.0.0.0"),
        ({"KT_API_KEY": "same", "KT_ADMIN_KEY": "same"}, "another key than KT_API_KEY"),
        ({"KT_PORT": "1"}, "port 1 on 192.0.2.1"),
    ],
)
def test_mistakes_are_one_line(
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.environ", {"WORKER_URLS": "http://a:1", "KT_PORT": "21999"} | variables)
    if "KT_PORT" in variables:
        monkeypatch.setenv("KT_HOST", "192.0.2.1")
        monkeypatch.setenv("KT_API_KEY", "k")
    assert main([]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_the_tested_router_is_the_pinned_one() -> None:
    requirements = (REPOSITORY / "requirements/router.txt").read_text()
    assert f"\nsglang-router=={version('sglang-router')} " in requirements


def test_the_routers_image_holds_what_it_loads() -> None:
    """Of this project; and its Python has no package that only the server has."""
    words = "import sys, deploy.router.__main__; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    stage = dockerfile.partition(" AS router\n")[2].partition("\nENTRYPOINT")[0]
    copied = set(re.findall(r"^COPY (\w+) /app/\1$", stage, re.MULTILINE))
    assert {name for name in loaded if (REPOSITORY / name).is_dir()} == copied
    assert not {"numpy", "torch", "sglang", "requests", "safetensors"} & loaded
