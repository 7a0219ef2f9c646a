"""The stage ``download`` when something is wrong: one line, exit code 2, nothing half done."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.hub import client as hub_client
from deploy.stages import download
from deploy.state import StageState, read_state
from kt_kernel.errors import UserError
from tests.deploy.helpers import (
    REPO_ID,
    REPOSITORY,
    LocalHub,
    clean_environment,
    command,
    content,
    fails,
    fetched,
    run,
)
from tests.locks import refuse_locks

TOKEN = "hf_secretsecretsecret"


def test_no_such_repository(hub: LocalHub, tmp_path: Path) -> None:
    line = fails("download", **hub.settings(tmp_path / "model", KT_MODEL_ID="lab/nothing"))
    assert f"{hub.endpoint} has no repository lab/nothing" in line
    assert "KT_MODEL_ID" in line
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_no_such_revision(hub: LocalHub, tmp_path: Path, revision: str) -> None:
    line = fails("download", **hub.settings(tmp_path / "model", KT_MODEL_REVISION=revision))
    assert f"{REPO_ID} at {hub.endpoint} has no revision {revision}" in line
    assert "KT_MODEL_REVISION" in line


def test_gated_without_a_token(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = start_hub(token=TOKEN)
    line = fails("download", **hub.settings(tmp_path / "model"))
    assert f"{REPO_ID} at {hub.endpoint} is gated" in line
    assert "HF_TOKEN" in line


def test_a_wrong_token_is_not_printed(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = start_hub(token=TOKEN)
    result = run("download", **hub.settings(tmp_path / "model", HF_TOKEN="hf_wrongwrongwrong"))
    assert result.returncode == 2
    assert f"error: {hub.endpoint} refuses the token for {REPO_ID} (HTTP 401)" in result.stderr
    assert "hf_wrong" not in result.stderr + result.stdout


def test_a_token_without_access(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = start_hub(token=TOKEN, forbidden_token="hf_other")
    line = fails("download", **hub.settings(tmp_path / "model", HF_TOKEN="hf_other"))
    assert "is gated: ask for access" in line


def test_the_right_token_from_a_file(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = start_hub(token=TOKEN)
    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    model = tmp_path / "model"
    result = run("download", **hub.settings(model, HF_TOKEN_FILE=str(secret)))
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stderr + result.stdout
    assert TOKEN not in (model / ".kt-download.json").read_text()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network(hub: LocalHub, tmp_path: Path, endpoint: str) -> None:
    settings = hub.settings(tmp_path / "model", HF_ENDPOINT=endpoint, KT_DOWNLOAD_RETRIES="0")
    line = fails("download", **settings)
    assert f"cannot reach {endpoint} for {REPO_ID}" in line
    assert "HF_ENDPOINT" in line


def test_certificates_that_are_not_there(hub: LocalHub, tmp_path: Path) -> None:
    settings = hub.settings(tmp_path / "model", REQUESTS_CA_BUNDLE="/no/such.pem")
    line = fails("download", **settings)
    assert "REQUESTS_CA_BUNDLE: expected a file of certificates, cannot read /no/such.pem" in line


def test_offline(hub: LocalHub, tmp_path: Path) -> None:
    line = fails("download", **hub.settings(tmp_path / "model", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in line


def test_a_connection_that_always_breaks(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = start_hub(shards=1, drop_after=100_000)
    settings = hub.settings(tmp_path / "model", KT_DOWNLOAD_RETRIES="0")
    line = fails("download", **settings)
    assert f"cannot reach {hub.endpoint}" in line
    marker = json.loads((tmp_path / "model" / ".kt-download.json").read_text())
    assert marker["complete"] is False


def test_a_connection_that_breaks_sometimes(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = start_hub(shards=2, drop_after=100_000, drop_times=3)
    result = run("download", **hub.settings(tmp_path / "model"))
    assert result.returncode == 0, result.stderr


def test_no_checkpoint_in_the_repository(hub: LocalHub, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors.index.json").unlink()
    line = fails("download", **hub.settings(tmp_path / "model"))
    assert "neither model.safetensors.index.json nor model.safetensors" in line


def test_a_shard_that_the_index_names_is_not_there(hub: LocalHub, tmp_path: Path) -> None:
    (hub.folder / "model-00002-of-000004.safetensors").unlink()
    line = fails("download", **hub.settings(tmp_path / "model"))
    assert "names model-00002-of-000004.safetensors, which the repository does not have" in line


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../b"}}', "{}", "[" * 10_000])
def test_an_index_that_is_none(hub: LocalHub, tmp_path: Path, text: str) -> None:
    (hub.folder / "model.safetensors.index.json").write_text(text)
    line = fails("download", **hub.settings(tmp_path / "model"))
    assert "is not an index of safetensors shards" in line


def test_a_directory_that_cannot_be_made(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = hub.settings(tmp_path / "file" / "model", HF_HOME=str(tmp_path / "hf-home"))
    line = fails("download", **settings)
    assert f"cannot write to KT_MODEL_PATH {tmp_path}/file/model" in line


def test_no_locks_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch)
    model, state = tmp_path / "model", StageState(tmp_path / "run", "download")
    with (
        pytest.raises(UserError, match=f"^cannot lock a file in KT_MODEL_PATH {model} "),
        download._only_one(model, state),
    ):
        pass


def test_a_marker_that_is_none(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".kt-download.json").write_text("{}")
    line = fails("download", **hub.settings(tmp_path / "model"))
    assert "is not a download marker of this version" in line


@pytest.mark.parametrize("killed", [False, True])
def test_two_at_once(start_hub: Callable[..., LocalHub], tmp_path: Path, killed: bool) -> None:
    """The second waits for the first, finds its model or goes on where it was killed."""
    hub = start_hub(rate=20_000)  # a minute, until the second one waits

    def start(name: str) -> subprocess.Popen[str]:
        settings = hub.settings(tmp_path / "model", KT_RUN_DIR=str(tmp_path / name))
        return subprocess.Popen(
            command("download"),
            env=clean_environment(**settings),
            cwd="/",
            stderr=subprocess.PIPE,
            text=True,
        )

    def next_line(process: subprocess.Popen[str]) -> str:
        assert process.stderr is not None
        return process.stderr.readline()

    first = start("first")
    assert "downloading" in next_line(first)
    with first, start("second") as second:
        try:
            line = next_line(second)
            assert f"another download to {tmp_path / 'model'} (pid {first.pid} on " in line
            state = read_state(tmp_path / "second", "download")
            assert state is not None
            assert state.line().startswith("download waits for another download to")
            hub.options.rate = 2_000_000
            if killed:
                first.kill()
            end = second.communicate(timeout=60)[1]
            assert second.returncode == 0, end
        finally:
            first.kill()
            second.kill()
    assert ("by the other download" in end) == (not killed)
    assert content(tmp_path / "model").keys() >= {*hub.needed}
    if not killed:
        assert {*fetched(hub.log_lines()).values()} == {1}


PRETEND_LITTLE_SPACE = """
import shutil, sys
usage = shutil.disk_usage("/")._replace(free=500_000)
shutil.disk_usage = lambda path: usage
from deploy.command_line import main
sys.exit(main(["download"]))
"""


def test_too_little_space_is_found_before(hub: LocalHub, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRETEND_LITTLE_SPACE],
        env=clean_environment(**hub.settings(tmp_path / "model")),
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert f"not enough free space for KT_MODEL_PATH {tmp_path}/model" in line
    assert "expected 1.2 MB, found 500.0 kB" in line
    assert set(fetched(hub.log_lines())) == {"model.safetensors.index.json"}


FILL_AND_DOWNLOAD = """
mount -t tmpfs -o size=3m none "$DISK" || exit 77
(sleep 0.2; while ! ls "$DISK"/model/*.safetensors >/dev/null 2>&1; do sleep 0.1; done
 head -c 4M /dev/zero >"$DISK/ballast") 2>/dev/null &
exec "$@"
"""


def test_a_disk_that_fills_up_meanwhile(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    """On a real file system of 3 MB, in a mount namespace of its own."""
    hub = start_hub(shards=5, rate=400_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = hub.settings(disk / "model", DISK=str(disk), KT_DOWNLOAD_WORKERS="1")
    settings["HF_HOME"] = str(tmp_path / "hf-home")
    result = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            FILL_AND_DOWNLOAD,
            "sh",
            *command("download"),
        ],
        env=clean_environment(**settings),
        cwd="/",
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip(f"this machine allows no mount namespaces: {result.stderr.strip()}")
    assert result.returncode == 2, result
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no space left" in errors[0]
    assert str(disk / "model") in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "no space left"),
        (
            RuntimeError("Data processing error: No space left on device (os error 28)"),
            "no space left",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/models/x"),
            "cannot write /models/x: Permission denied",
        ),
        (RuntimeError("something\nnew"), "downloading lab/small failed: RuntimeError: something"),
    ],
)
def test_what_the_client_raises(raised: Exception, expected: str) -> None:
    with pytest.raises(UserError) as caught, hub_client.explained(REPO_ID, "main", Path("/models")):
        raise raised
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_space_inside_another_exception() -> None:
    def fail() -> Any:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the transfer failed") from error

    with (
        pytest.raises(UserError, match="no space left while downloading to /models"),
        hub_client.explained(REPO_ID, "main", Path("/models")),
    ):
        fail()
