"""Who may write where: on directories of another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.checks.access import check_write_access
from deploy.checks.machine import check_run_directory
from deploy.checks.result import Result, Status
from deploy.checks.situation import Situation
from deploy.settings.config import load
from tests.deploy.helpers import LAPTOP, Prepared


@pytest.fixture(autouse=True)
def nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may write anywhere."""
    monkeypatch.setattr("os.access", lambda *_: False)


def results(**variables: str) -> list[Result]:
    config = load(variables)
    return list(check_write_access(Situation(config.values, config.environment, LAPTOP)))


def test_the_owner_is_told_and_what_to_do(tmp_path: Path) -> None:
    for name in ("weights", "cache/triton", "cache/.cache/flashinfer"):
        (tmp_path / name).mkdir(parents=True)
    cache = f"{tmp_path}/cache"
    found = results(
        KT_MODEL_PATH=f"{tmp_path}/new/model",
        KT_WEIGHT_PATH=f"{tmp_path}/weights",
        XDG_CACHE_HOME=cache,
        HF_HOME=f"{cache}/huggingface",  # to be made below one that is told
        TRITON_CACHE_DIR=f"{cache}/triton",
        FLASHINFER_WORKSPACE_BASE=cache,
    )
    assert [result.status for result in found] == [Status.FAIL] * 5
    owner = f"{os.getuid()}:{os.getgid()}"
    folders = ["", "/weights", "/cache", "/cache/triton", "/cache/.cache/flashinfer"]
    for result, folder in zip(found, folders, strict=True):
        assert result.found.startswith(f"{tmp_path}{folder} of {owner}, mode ")
        assert f"`chown -R {owner}`" in result.todo
        assert f"RUN_AS={owner}" in result.todo


def test_what_is_finished_need_not_be_written(prepared: Prepared) -> None:
    assert not results(KT_MODEL_PATH=str(prepared.model), KT_WEIGHT_PATH=str(prepared.int4))


def test_files_of_the_server_are_looked_at_before(tmp_path: Path, prepared: Prepared) -> None:
    """Fails when one that cannot be made is told only by the server, or never."""
    names = ("KT_ENDPOINT_PATH", "KT_EXPERT_COUNTS")
    files = {name: f"{tmp_path}/{name}/new/file" for name in names}
    for name in names:
        (tmp_path / name).mkdir()
    found = results(KT_MODEL_PATH=str(prepared.model), KT_WEIGHT_PATH=str(prepared.int4), **files)
    assert [result.found.split(" ")[0] for result in found] == [f"{tmp_path}/{n}" for n in names]


def test_states_are_not_worth_a_failure(tmp_path: Path) -> None:
    config = load({"KT_RUN_DIR": str(tmp_path)})
    (result,) = check_run_directory(Situation(config.values, config.environment, LAPTOP))
    assert result.status is Status.WARN
    assert f"cannot write to {tmp_path}" in result.found
