"""The stage ``download`` against a hub that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.helpers import REPO_ID, LocalHub, content, fails, fetched, run

INDEX = "model.safetensors.index.json"


def download(hub: LocalHub, directory: Path, **more: str) -> str:
    """Download; returns what was said."""
    result = run("download", **hub.settings(directory, **more))
    assert (result.returncode, result.stdout) == (0, ""), result
    return result.stderr


def test_fetches_what_is_needed_and_nothing_twice(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    names = {name for name in content(model) if not name.startswith(".kt-download")}
    assert names == set(hub.needed)
    for name in hub.needed:
        assert (model / name).read_bytes() == (hub.folder / name).read_bytes()
    assert fetched(hub.log_lines()) == dict.fromkeys(hub.needed, 1)


def test_marker(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    marker = json.loads((model / ".kt-download.json").read_text())
    assert marker["repo_id"] == REPO_ID
    assert marker["requested_revision"] == "main"
    assert marker["revision"] == hub.revision
    assert marker["complete"] is True
    assert marker["total_bytes"] == sum((hub.folder / n).stat().st_size for n in hub.needed)
    assert sorted(marker["files"]) == hub.needed
    for name, file in marker["files"].items():
        assert file["size"] == (hub.folder / name).stat().st_size
        assert bool(file["sha256"]) == name.endswith(".safetensors")


def test_a_second_run_downloads_nothing(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    before = content(model)
    hub.forget()
    said = download(hub, model)
    assert "already holds" in said
    assert fetched(hub.log_lines()) == {}
    assert content(model) == before


def test_a_pinned_commit_needs_no_network(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    settings = hub.settings(model, HF_ENDPOINT="http://127.0.0.1:9", KT_MODEL_REVISION=hub.revision)
    result = run("download", **settings)
    assert result.returncode == 0
    assert "already holds" in result.stderr
    assert "warning" not in result.stderr


def test_a_branch_without_network_keeps_what_is_there(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    for unreachable in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        said = download(hub, model, KT_DOWNLOAD_RETRIES="0", **unreachable)
        assert "warning: " in said
        assert f"keeping {model}" in said
        assert hub.revision in said


def test_a_branch_without_network_must_be_the_one_that_is_there(
    hub: LocalHub, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    download(hub, model)
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "KT_DOWNLOAD_RETRIES": "0"}
    settings = hub.settings(model, **gone, KT_MODEL_REVISION="v2")
    assert "cannot reach http://127.0.0.1:9" in fails("download", **settings)


def test_a_new_revision_fetches_what_changed(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    old = hub.revision
    shard = "model-00002-of-000004.safetensors"
    changed = bytearray((hub.folder / shard).read_bytes())
    changed[-1] ^= 1  # same size
    (hub.folder / shard).write_bytes(changed)
    (hub.folder / "README.md").unlink()
    hub.forget()
    said = download(hub, model)
    assert f"main is now commit {hub.revision}" in said
    assert old in said
    assert fetched(hub.log_lines()) == {shard: 1}
    assert (model / shard).read_bytes() == changed
    assert not (model / "README.md").exists()
    fresh = tmp_path / "fresh"
    download(hub, fresh)
    assert content(model) == content(fresh)


def test_another_repository_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    before = content(model)
    shutil.copytree(hub.folder, hub.folder.parent / "other")
    line = fails("download", **hub.settings(model, KT_MODEL_ID="lab/other"))
    assert f"{model} holds {REPO_ID}, KT_MODEL_ID is lab/other" in line
    assert content(model) == before


def test_a_lost_file_is_fetched_again(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model)
    before = content(model)
    lost, cut = "model-00001-of-000004.safetensors", "model-00003-of-000004.safetensors"
    (model / lost).unlink()
    (model / cut).write_bytes((model / cut).read_bytes()[:-10])
    hub.forget()
    said = download(hub, model)
    assert lost in said
    assert fetched(hub.log_lines()) == {lost: 1, cut: 1}
    assert content(model) == before


def test_damage_of_the_same_size_is_found(hub: LocalHub, tmp_path: Path) -> None:
    """A mirror that serves other bytes than it lists, then mends itself."""
    model = tmp_path / "model"
    shard = "model-00002-of-000004.safetensors"
    download(hub, model)
    damaged = bytearray((model / shard).read_bytes())
    damaged[1000] ^= 1
    (model / shard).write_bytes(damaged)
    marker = json.loads((model / ".kt-download.json").read_text())
    marker["complete"] = False
    (model / ".kt-download.json").write_text(json.dumps(marker))
    hub.forget()
    said = download(hub, model)
    assert f"{shard} damaged" in said or fetched(hub.log_lines()) == {shard: 1}
    assert (model / shard).read_bytes() == (hub.folder / shard).read_bytes()


def test_files_of_an_earlier_download_are_taken_over(hub: LocalHub, tmp_path: Path) -> None:
    """The tutorial's own `huggingface-cli download` leaves no marker, but the files count."""
    model = tmp_path / "model"
    download(hub, model)
    whole = content(model)
    (model / ".kt-download.json").unlink()
    shutil.rmtree(model / ".cache")
    hub.forget()
    download(hub, model)
    again = fetched(hub.log_lines())
    assert not any(name.endswith(".safetensors") for name in again)
    assert content(model) == whole


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("config.json", "{}", "holds a config.json that is not this repository's: move it, or set"),
        ("model-00001-of-000002.safetensors", "", "holds a model-00001-of-000002.safetensors that"),
        ("notes.txt", "mine", "holds other files: expected an empty directory or an earlier"),
    ],
)
def test_files_of_others_are_left_alone(
    start_hub: Callable[..., LocalHub], tmp_path: Path, name: str, text: str, found: str
) -> None:
    """Fails when a download fills ``/`` or a home, or overwrites what it did not write."""
    hub = start_hub(shards=2, shard_bytes=1000)
    model = tmp_path / "model"
    model.mkdir()
    (model / name).write_text(text)
    assert f"KT_MODEL_PATH {model} {found}" in fails("download", **hub.settings(model))
    assert [(path.name, path.read_text()) for path in model.iterdir()] == [(name, text)]


def test_progress_without_a_terminal(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = start_hub(shards=2, shard_bytes=600_000, rate=300_000)
    said = download(hub, tmp_path / "model", KT_PROGRESS_INTERVAL="0.3")
    lines = [line for line in said.splitlines() if line.startswith("downloading ")]
    progress = [line for line in lines if "%" in line]
    assert len(progress) >= 3
    assert "of 1.2 MB" in progress[0]
    shares = [int(line.split("(")[1].split("%")[0]) for line in progress]
    assert shares == sorted(shares)
    assert 0 < shares[len(shares) // 2] < 100


def test_verify_by_size_only(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(hub, model, KT_VERIFY_DOWNLOAD="size")
    assert json.loads((model / ".kt-download.json").read_text())["complete"] is True
