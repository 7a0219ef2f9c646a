"""Damage of any kind to any file that the stages read: a value of the right type, or one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.source.origin import MARKER_NAME
from deploy.checks.machine import check_disk, check_memory
from deploy.checks.model import check_model, check_weights
from deploy.checks.needs import model_needs
from deploy.checks.registry import run_checks
from deploy.checks.situation import Situation
from deploy.errors import UserErrors
from deploy.hub.digests import Verifier
from deploy.hub.marker import Marker, MarkerDamaged, RepoFile, read_marker
from deploy.launch.argv import resolve
from deploy.launch.by_card import memory_line
from deploy.launch.gpu_memory import V32_CONFIG
from deploy.settings.config import load
from deploy.stages import health
from deploy.state import State, read_state, write_state
from kt_kernel.errors import UserError
from tests.deploy.helpers import H200, LAPTOP, Prepared, run, with_gpu
from tests.mutations import EXAMPLES, damaged_bytes, damaged_json, fuzz, odd_files, put

MARKER = Marker(
    "a/b",
    "main",
    "1" * 40,
    {"config.json": RepoFile(10, "", "2" * 40), "a.safetensors": RepoFile(20, "3" * 64, "4" * 40)},
    verified={"a.safetensors": [20, 10**18]},
    stale=["old.json"],
)


@fuzz()
@given(data=st.data())
def test_damaged_marker(data: st.DataObject, tmp_path: Path) -> None:
    MARKER.save(tmp_path)
    content = (tmp_path / MARKER_NAME).read_bytes()
    put(tmp_path / MARKER_NAME, data.draw(st.one_of(damaged_json(content), damaged_bytes(content))))
    with contextlib.suppress(UserError):
        marker = read_marker(tmp_path)
        assert marker is not None
        marker.missing(tmp_path)
        assert marker.total_bytes >= 0
        assert all((tmp_path / name).resolve().is_relative_to(tmp_path) for name in marker.stale)
        marker.save(tmp_path)


@pytest.mark.parametrize("content", [b"null", b"[]", b"0"])
def test_a_marker_that_is_no_object_is_made_again(tmp_path: Path, content: bytes) -> None:
    """The advice is to run the download again: it has to take that for damage, too."""
    put(tmp_path / MARKER_NAME, content)
    with pytest.raises(MarkerDamaged, match="expected a JSON object"):
        read_marker(tmp_path)


@fuzz()
@given(data=st.data())
def test_damaged_state(data: st.DataObject, tmp_path: Path) -> None:
    """`health` and `status` tell something of any state file, in JSON that others can read."""
    phase = data.draw(st.sampled_from(["loading", "downloading", "done"]))
    state = State("serve", phase, "", 1, 2, "bytes", os.getpid(), 5, "pid:[1]", 1e9, 1e9)
    write_state(tmp_path, state)
    for name in ("serve.json", "serve-layers.json"):
        content = json.dumps(asdict(state)).encode()
        put(
            tmp_path / name,
            data.draw(
                st.one_of(damaged_json(content), damaged_json(content), damaged_bytes(content))
            ),
        )
    found = health.find_state(tmp_path, None)
    if found is not None:
        assert (found.stage, read_state(tmp_path, "serve")) == ("serve", found)
        found = health.examine(found, tmp_path, "http://127.0.0.1:9/health")
    json.dumps(health.report_of(found, tmp_path), allow_nan=False)


@fuzz()
@given(data=st.data())
def test_damaged_config(data: st.DataObject, tmp_path: Path) -> None:
    """Sizes that settings are chosen by come from it: none may be of another type, or endless."""
    content = json.dumps(dict(V32_CONFIG)).encode()
    damaged = st.one_of(damaged_json(content), damaged_bytes(content))
    put(tmp_path / "config.json", data.draw(damaged))
    config = load({"KT_MODEL_PATH": str(tmp_path)})
    machine = with_gpu(H200)
    values, _ = resolve(config, machine)
    memory_line(values, machine)
    needs = model_needs(tmp_path)
    assert needs.memory(values) >= 0
    assert needs.download >= 0


@fuzz(EXAMPLES // 2)
@given(data=st.data())
def test_damaged_model_and_weights(data: st.DataObject, prepared: Prepared, tmp_path: Path) -> None:
    """`check` reports them: its checks read all that `serve` reads before it starts."""
    shutil.rmtree(tmp_path / "all", ignore_errors=True)
    model = Path(shutil.copytree(prepared.model, tmp_path / "all/m", copy_function=os.link))
    weights = Path(shutil.copytree(prepared.int4, tmp_path / "all/w", copy_function=os.link))
    names = ["config.json", "model.safetensors.index.json", "manifest.json", "manifest.json"]
    name = data.draw(st.sampled_from(names))
    folder = weights if name == "manifest.json" else model
    content = (folder / name).read_bytes()
    put(folder / name, data.draw(st.one_of(damaged_json(content), damaged_bytes(content))))
    config = load({"KT_MODEL_PATH": str(model), "KT_WEIGHT_PATH": str(weights)})
    values, _ = resolve(config, LAPTOP)
    situation = Situation(values, config.environment, LAPTOP)
    checks = (check_memory, check_disk, check_model, check_weights)
    for result in run_checks(situation, checks):
        assert "\n" not in result.sentence()


@pytest.mark.parametrize("kind", odd_files())
def test_odd_files(tmp_path: Path, kind: str) -> None:
    """A directory, a pipe, a loop of links ... in the place of each file: no wait, no traceback."""
    for name in (MARKER_NAME, "config.json", "model.safetensors.index.json", "manifest.json"):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        odd_files()[kind](folder / name)
        with contextlib.suppress(UserError):
            read_marker(folder)
        config = load({"KT_MODEL_PATH": str(folder), "KT_WEIGHT_PATH": str(folder)})
        values, _ = resolve(config, with_gpu(H200))
        situation = Situation(values, config.environment, LAPTOP)
        for check in (check_memory, check_disk, check_model, check_weights):
            assert list(check(situation))
    odd_files()[kind](tmp_path / "a")
    files = {"a": RepoFile((tmp_path / "a").lstat().st_size + 1, "", "0" * 40)}
    assert Verifier(tmp_path, Marker("a/b", "c", "d", files), True).bad_files(["a"]) == ["a"]
    for name in ("serve.json", ".serve.lock"):
        folder = tmp_path / f"state of {name}"
        write_state(folder, State("serve", "loading", pid_namespace="pid:[1]"))
        (folder / name).unlink(missing_ok=True)
        odd_files()[kind](folder / name)
        found = health.find_state(folder, None)
        assert found is None or not found.is_alive(folder)
    odd_files()[kind](tmp_path / "settings")
    if kind not in ("empty", "pipe"):  # a pipe may be a shell's: kt_kernel/files/test_foreign.py
        with pytest.raises(UserErrors):
            load({}, [tmp_path / "settings"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": "\\ud800"}', "NaN", '{"a":' * 80])
def test_json_of_a_setting(text: str) -> None:
    with pytest.raises(UserErrors, match="KT_MODEL_OVERRIDE_ARGS: expected a JSON object"):
        load({"KT_MODEL_OVERRIDE_ARGS": text})


@fuzz()
@given(data=st.data())
def test_damaged_settings_file(data: st.DataObject, tmp_path: Path) -> None:
    content = b"KT_PORT=30000\nexport KT_HOST='::1'\n# x\nHF_TOKEN=\"a\\tb\"\n"
    path = put(tmp_path / ".env", data.draw(damaged_bytes(content)))
    with contextlib.suppress(UserError):
        found = load({}, [path])
        assert all("\0" not in value for value in found.environment.values())


def test_an_error_of_the_system_is_one_line(tmp_path: Path) -> None:
    """A path that cannot even be looked at, as in no message of our own."""
    result = run("convert", KT_MODEL_PATH="/" + "x" * 300, KT_WEIGHT_PATH=str(tmp_path / "w"))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "File name too long" in result.stderr
    assert "Traceback" not in result.stderr
