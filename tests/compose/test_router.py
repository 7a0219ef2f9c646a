"""What docker/router.sh starts the router with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.compose.files import REPOSITORY

FLAGS = ["--port=30000", "--policy=cache_aware"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a ``python`` that prints its arguments, one a line."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    return tmp_path


def start(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(REPOSITORY / "docker/router.sh"), *FLAGS],
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
    )


def arguments(folder: Path, **variables: str) -> list[str]:
    result = start(folder, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_servers_and_flags(folder: Path) -> None:
    found = arguments(folder, REPLICAS="2", PROJECT="p", PORT="30000")
    at = found.index("--worker-urls")
    assert found[at + 1 : at + 3] == ["http://p-serve-1:30000", "http://p-serve-2:30000"]
    assert found[-2:] == FLAGS
    assert "--api-key" not in found
    assert "http://a:1" in arguments(folder, WORKER_URLS="http://a:1 https://b:2")


def test_a_request_that_ended_a_server_is_not_sent_to_the_next(folder: Path) -> None:
    assert "--disable-retries" in arguments(folder, WORKER_URLS="http://a:1")


def test_a_key_is_sent_and_costs_no_flag(folder: Path) -> None:
    (folder / "key").write_text("k1\n")
    for variables in ({"KT_API_KEY": "k1"}, {"KT_API_KEY_FILE": str(folder / "key")}):
        found = arguments(folder, WORKER_URLS="http://a:1", **variables)
        assert found[found.index("--api-key") + 1] == "k1"
        assert found[-2:] == FLAGS


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORKER_URLS": "a:1"}, "expected addresses like http://host:30000, found a:1"),
        ({"KT_API_KEY": "a", "KT_API_KEY_FILE": "/b"}, "both KT_API_KEY and KT_API_KEY_FILE"),
        ({"KT_API_KEY_FILE": "/no/such"}, "cannot read KT_API_KEY_FILE /no/such"),
    ],
)
def test_mistakes_are_one_line(folder: Path, variables: dict[str, str], message: str) -> None:
    result = start(folder, **{"WORKER_URLS": "http://a:1", **variables})
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_servers_are_asked_without_a_proxy(folder: Path) -> None:
    (folder / "python").write_text("#!/bin/sh\nenv\n")
    variables = arguments(folder, WORKER_URLS="http://a:1", HTTP_PROXY="p", all_proxy="p")
    assert not [line for line in variables if "proxy" in line.lower()]
