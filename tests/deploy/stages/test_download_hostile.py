"""The stage ``download`` against a repository whose files and names are meant to do harm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.hub import client
from deploy.hub.marker import MarkerDamaged, read_marker
from examples.tiny.repositories import HubFile, Repositories, Snapshot
from kt_kernel.errors import UserError
from tests.deploy.helpers import LocalHub, content, fails, run

MARKER = ".kt-download.json"
INDEX = "model.safetensors.index.json"


def offer(monkeypatch: pytest.MonkeyPatch, folder: Path, files: Mapping[str, bytes]) -> None:
    """Let the hub list and serve these files besides, whatever their names."""
    extra: dict[str, HubFile] = {}
    for number, (name, data) in enumerate(files.items()):
        path = folder / str(number)
        path.write_bytes(data)
        git_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        extra[name] = HubFile(path, len(data), git_id, hashlib.sha256(data).hexdigest())
    snapshot = Repositories.snapshot

    def with_extra(self: Repositories, *asked: Any) -> Snapshot:
        found = snapshot(self, *asked)
        return Snapshot(found.revision, {**found.files, **extra})

    monkeypatch.setattr(Repositories, "snapshot", with_extra)


def hostile_marker(hub: LocalHub, victims: list[str]) -> bytes:
    """Says that all is there, and that these files are old ones."""
    marker = {
        "format": "kt-download",
        "format_version": 1,
        "repo_id": "lab/small",
        "requested_revision": "main",
        "revision": hub.revision,
        "complete": True,
        "total_bytes": 0,
        "files": {},
        "stale": victims,
    }
    return json.dumps(marker).encode()


def test_a_repository_cannot_replace_the_marker(
    hub: LocalHub,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its stale names were removed, outside the folder too, or nothing was said to be all."""
    (tmp_path / "victim").write_text("precious")
    victims = ["../victim", str(tmp_path / "victim")]
    names = (MARKER, f"{MARKER}.tmp", ".kt-download.lock", "..json", "a\\b.json", "\x1b[31m.json")
    evil = dict.fromkeys(names, hostile_marker(hub, victims))
    offer(monkeypatch, tmp_path_factory.mktemp("evil"), evil)
    model = tmp_path / "model"
    hub.options.drop_after, hub.options.drop_times = 100_000, 1
    fails("download", **hub.settings(model, KT_DOWNLOAD_RETRIES="0"))
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert run("download", **hub.settings(model, **offline)).returncode == 0
        marker = read_marker(model)
        assert marker is not None
        assert marker.complete
        assert sorted(marker.files) == hub.needed
        assert {*content(model)} == {*hub.needed, MARKER, ".kt-download.lock"}
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_marker_that_came_another_way(hub: LocalHub, tmp_path: Path) -> None:
    """With the files, by a tool that takes what is there: it is damage, and removes nothing."""
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "victim").write_text("precious")
    for victims in (["../victim"], [str(tmp_path / "victim")], [".kt-download.lock"], []):
        (model / MARKER).write_bytes(hostile_marker(hub, victims))
        with pytest.raises(MarkerDamaged):
            read_marker(model)
    (model / MARKER).write_bytes(hostile_marker(hub, ["../victim"]))
    result = run("download", **hub.settings(model))
    assert result.returncode == 0
    assert "making it again" in result.stderr
    assert {*hub.needed} <= {*content(model)}
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_shard_that_is_no_shard(tmp_path: Path) -> None:
    """Weights only, right in the folder: no code and no pickle comes by way of the index."""
    for name in (
        "../x.safetensors",
        "/x.safetensors",
        ".x.safetensors",
        "evil.py",
        "a.bin",
        MARKER,
    ):
        index = {"weight_map": {"t0": "model-1.safetensors", "t1": name}}
        (tmp_path / INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError, match=f"{INDEX} is not an index of safetensors shards"):
            client.read_shards(tmp_path)


def test_python_code_comes_only_when_it_is_asked_for(hub: LocalHub, tmp_path: Path) -> None:
    """Also under a name that a pattern for data takes; it is fetched when it is wanted later."""
    code = {"modeling_x.py", "tokenizer_x.py"}
    for name in code:
        (hub.folder / name).write_text("raise SystemExit\n")
    model = tmp_path / "model"
    assert run("download", **hub.settings(model)).returncode == 0
    assert code.isdisjoint(content(model))
    result = run("download", **hub.settings(model, KT_TRUST_REMOTE_CODE="1"))
    assert "KT_TRUST_REMOTE_CODE is on" in result.stderr
    assert code <= {*content(model)}
