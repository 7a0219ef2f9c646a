"""kill -9 at any moment of a download, then run it again."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.hub.marker import RepoFile
from deploy.hub.unfinished import partial_path
from examples.tiny.hub import HubHandler
from tests.deploy.helpers import (
    REPO_ID,
    LocalHub,
    clean_environment,
    command,
    content,
    fetched,
    run,
)

SHARDS, SHARD_BYTES = 6, 400_000
#: Files besides the shards may be on their way, too.
SMALL_FILES = 10_000


def kill_after(seconds: float, settings: dict[str, str]) -> bool:
    """Start a download and kill it; whether it was killed before it had finished."""
    process = subprocess.Popen(
        command("download"),
        env=clean_environment(**settings),
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(timeout=seconds) != 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def kill_in_the_middle_of_a_file(model: Path, settings: dict[str, str]) -> None:
    """Start a download and kill it as soon as it has begun to write a file."""
    process = subprocess.Popen(
        command("download"),
        env=clean_environment(**settings),
        cwd="/",
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(model.glob(".cache/huggingface/download/*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()


def finished_files(model: Path, hub: LocalHub) -> set[str]:
    """Large files that a killed download left in full."""
    return {
        name
        for name in hub.needed
        if name.endswith(".safetensors")
        and (model / name).is_file()
        and (model / name).stat().st_size == (hub.folder / name).stat().st_size
    }


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(
    start_hub: Callable[..., LocalHub], tmp_path: Path, seed: int
) -> None:
    hub = start_hub(SHARDS, SHARD_BYTES, rate=200_000)
    model = tmp_path / "model"
    settings = hub.settings(model, KT_DOWNLOAD_WORKERS="2")
    random_numbers = random.Random(seed)
    kills = 0
    for _ in range(4):
        before = finished_files(model, hub)
        hub.forget()
        # A whole download takes six seconds at this rate, so the first kill comes before its end.
        kills += kill_after(random_numbers.uniform(0.7, 3.0), settings)
        assert not before & set(fetched(hub.log_lines())), "a finished file was fetched again"
    before = finished_files(model, hub)
    begun = sum(path.stat().st_size for path in model.rglob("*.incomplete"))
    hub.forget()
    hub.options.rate = None
    result = run("download", **settings)
    assert result.returncode == 0, result.stderr
    assert kills > 0
    assert not before & set(fetched(hub.log_lines()))
    shards = [name for name in hub.needed if name.endswith(".safetensors")]
    missing = sum((hub.folder / name).stat().st_size for name in shards if name not in before)
    assert sum(map(sum, bytes_of_files(hub).values())) <= missing - begun + SMALL_FILES
    fresh = tmp_path / "fresh"
    assert run("download", **hub.settings(fresh)).returncode == 0
    assert content(model) == content(fresh)


def test_killed_in_the_middle_of_a_file_leaves_no_rubbish(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = start_hub(SHARDS, SHARD_BYTES, rate=100_000)
    model = tmp_path / "model"
    settings = hub.settings(model)
    kill_in_the_middle_of_a_file(model, settings)
    assert json.loads((model / ".kt-download.json").read_text())["complete"] is False
    assert list(model.glob(".cache/huggingface/download/*.incomplete"))
    hub.options.rate = None
    assert run("download", **settings).returncode == 0
    assert not list(model.glob(".cache/huggingface/download/*.incomplete"))
    assert json.loads((model / ".kt-download.json").read_text())["complete"] is True


def test_killed_during_an_update_is_no_model(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    """Files of two revisions are never taken for one model."""
    hub = start_hub(SHARDS, SHARD_BYTES)
    model = tmp_path / "model"
    settings = hub.settings(model)
    assert run("download", **settings).returncode == 0
    old = hub.revision
    for name in hub.needed:
        if name.endswith(".safetensors"):
            changed = bytearray((hub.folder / name).read_bytes())
            changed[-1] ^= 1
            (hub.folder / name).write_bytes(changed)
    (hub.folder / "README.md").unlink()
    hub.options.rate = 100_000
    kill_in_the_middle_of_a_file(model, settings)
    marker = json.loads((model / ".kt-download.json").read_text())
    assert marker["complete"] is False
    refused = run("serve", **settings, KT_DEVICE="cpu", KT_CPUINFER="1", KT_PORT="39999")
    assert refused.returncode == 2
    assert "an unfinished download" in refused.stderr
    hub.options.rate = None
    assert run("download", **settings).returncode == 0
    assert hub.revision != old
    fresh = tmp_path / "fresh"
    assert run("download", **hub.settings(fresh)).returncode == 0
    assert content(model) == content(fresh)


@pytest.mark.parametrize("verify", ["sha256", "size"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_what_an_earlier_run_left_of_a_file(
    hub: LocalHub, tmp_path: Path, ranges: bool, verify: str
) -> None:
    """Beginnings are continued; damage, too many bytes and other contents never get into a file."""

    class NoRanges(HubHandler):
        def _range(self, size: int) -> tuple[int, int]:
            return 0, size

    if not ranges:
        hub.hub.RequestHandlerClass = NoRanges
    model = tmp_path / "model"
    listed = hub.hub.repositories.snapshot(REPO_ID).files
    shards = [name for name in hub.needed if name.endswith(".safetensors")]

    def leave(name: str, content: bytes, sha256: str = "") -> Path:
        file = listed[name]
        path = partial_path(model, name, RepoFile(file.size, sha256 or file.sha256, file.git_id))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    whole = {name: (hub.folder / name).read_bytes() for name in shards}
    continued, damaged, long, revised = shards
    leave(continued, whole[continued][:200_000])
    leave(damaged, b"x" * 200_000)
    leave(long, whole[long] + b"x")
    old = leave(revised, b"y" * 200_000, sha256="0" * 64)
    result = run("download", **hub.settings(model, KT_VERIFY_DOWNLOAD=verify))
    assert result.returncode == 0, result.stderr
    for name in shards:
        assert (model / name).read_bytes() == whole[name]
    assert not old.exists()
    sent = bytes_of_files(hub)
    size = len(whole[continued])
    assert sent[continued] == [size - 200_000 if ranges else size]
    assert sent[damaged] == ([size - 200_000, size] if ranges else [size])
    assert sent[long] == sent[revised] == [size]


def bytes_of_files(hub: LocalHub) -> dict[str, list[int]]:
    """Body bytes of each answer with a shard, in order."""
    found: dict[str, list[int]] = {}
    for line in hub.log_lines():
        _, path, _, count = line.split()
        if path.endswith(".safetensors"):
            found.setdefault(path.rpartition("/")[2], []).append(int(count))
    return found
