"""Secrets stand in no message, no printed command and no state: only where they are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants

from deploy.console import say
from deploy.errors import UserErrors
from deploy.hub import client
from deploy.launch.argv import serve_command
from deploy.settings.config import load
from deploy.settings.variables import may_show
from deploy.stages.health import examine
from deploy.state import StageState, read_state
from kt_kernel.errors import UserError, describe, one_line
from tests.deploy.helpers import L20, fails, with_gpu

SECRET = "s3cr3t"
ADDRESS = f"http://me:{SECRET}@127.0.0.1:9"


@pytest.mark.parametrize(
    "line",
    [
        f"HF_TOKEN {SECRET}",
        f"HF TOKEN={SECRET}",
        SECRET,
        f"{SECRET}=",  # the end of a key in base64, on a line of its own
        f"{SECRET}: x",
        f"{SECRET}='x' y",
        f"OMP_X=1\n{SECRET}=1\n{SECRET}=1",
        f"HF_TOKEN='{SECRET}' {SECRET}",
        f"HF_TOKEN='{SECRET}",
        f"HF_TOKEN=pa${{{SECRET}}}ä",
        f"HF_TOKEN=pa${{x:?{SECRET}}}",
        f"HF_TOKEN=pa${{x{SECRET}^^}}",
        f"KT_API_KEY={SECRET} {SECRET}",
        f"KT_API_KEY={SECRET}ä",
        f"KT_EXTRA_ARGS=--admin-api-key '{SECRET}",
        f"KT_EXTRA_ARGS=${SECRET}'",
        f"HF_ENDPOINT=htp://me:{SECRET}@host",
        f"HF_ENDPOINT='http://me:{SECRET} x@host'",
        f"KT_STATUS_SERVER=me:{SECRET}@host",
        f"HTTPS_PROXY=http://me:${SECRET}@host\nKT_PORT=x",
        f"KT_HOST=http://me:{SECRET}@host/",
    ],
)
def test_lines_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (tmp_path / "a.env").write_text(f"{line}\n")
    with pytest.raises(UserErrors) as caught:
        load({}, [tmp_path / "a.env"], "download")
    shown = capsys.readouterr().err + " ".join(caught.value.messages)
    assert SECRET not in shown
    assert "a.env:" in shown


def test_a_key_is_checked_before_anything_starts(tmp_path: Path) -> None:
    """It is sent in a header: another one would fail at every request, or end the server."""
    for key in ("schlüssel", "two words", "line\nbreak", "\u200bkey"):
        (tmp_path / "key").write_text(key)
        for given in ({"KT_API_KEY": key}, {"KT_API_KEY_FILE": str(tmp_path / "key")}):
            with pytest.raises(UserErrors, match=r"KT_API_KEY.*(not shown|one line)") as caught:
                load(given, stage="serve")
            assert key not in str(caught.value)


def test_flags_that_no_setting_knows(tmp_path: Path) -> None:
    """Any of them may be a key; their names are shown, and the server gets them as they are."""
    extra = f"--other-key {SECRET} --ssl-keyfile-password={SECRET} -x {SECRET}"
    (tmp_path / "a.env").write_text(f"SGLANG_API_KEY={SECRET}\nSGLANG_X={ADDRESS}\nSGLANG_Y=1\n")
    config = load({"KT_EXTRA_ARGS": extra, "KT_API_KEY": SECRET}, [tmp_path / "a.env"], "serve")
    command = serve_command(config, with_gpu(L20))
    assert command.argv[-5:] == extra.split()
    shown = command.shown()
    assert SECRET not in shown + json.dumps(command.shown_argv())
    assert shown.endswith("--other-key '***' '--ssl-keyfile-password=***' '***' '***'")
    assert "SGLANG_API_KEY='***'" in shown or "'SGLANG_API_KEY=***'" in shown
    assert "SGLANG_Y=1" in shown


def test_which_variables_may_be_shown() -> None:
    private = ("HF_TOKEN", "KT_API_KEY", "KT_EXTRA_ARGS", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN")
    assert not any(map(may_show, (*private, "https_proxy", "SGLANG_API_KEY", "AWS_PASSWORD")))
    shown = ("KT_PORT", "HF_TOKEN_FILE", "KT_GPU_PREFILL_TOKEN_THRESHOLD", "OMP_NUM_THREADS")
    assert all(map(may_show, shown))


@pytest.mark.parametrize(
    "show",
    [
        one_line,
        lambda text: str(UserError(text)),
        lambda text: " ".join(UserErrors([text]).messages),
        lambda text: describe(OSError(2, "not there", text)),
    ],
)
def test_addresses_in_messages(show: Callable[[str], str]) -> None:
    for password in (SECRET, f"p/{SECRET}", f"p@{SECRET}", f"p://{SECRET}"):
        shown = show(f"cannot reach http://me:{password}@host:1/x for a")
        assert SECRET not in shown
        assert "http://***@host:1/x" in shown
    assert "me@example.org" in show("write to me@example.org or https://host/x")


def test_addresses_in_warnings_and_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(f"warning: {ADDRESS}")
    state = StageState(tmp_path, "serve")
    state.fail(f"ConnectError: {ADDRESS}")
    found = read_state(tmp_path, "serve")
    assert found is not None
    state.set("warming up")
    asked = read_state(tmp_path, "serve")
    assert asked is not None
    shown = found.line() + examine(asked, tmp_path, f"{ADDRESS}/health").line()
    assert SECRET not in shown + capsys.readouterr().err
    assert "http://***@127.0.0.1:9" in found.line()


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError(f"cannot reach {ADDRESS}"),
        httpx.TooManyRedirects(ADDRESS),
        json.JSONDecodeError(ADDRESS, "<html>", 0),
        json.JSONDecodeError(ADDRESS, "x", 0),
        TypeError(ADDRESS),
        RuntimeError(f"{ADDRESS}\nsecond line"),
        OSError(28, "full", ADDRESS),
        OSError(5, "broken", ADDRESS),
    ],
)
def test_the_hubs_address_in_explanations(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", ADDRESS)
    with pytest.raises(UserError) as caught, client.explained("a/b", "main", Path("/m")):
        raise error
    assert SECRET not in str(caught.value)


def test_a_download_from_an_address_with_a_password(tmp_path: Path) -> None:
    """All the way, in a process of its own: its lines, and what its state says."""
    settings = {"HF_ENDPOINT": ADDRESS, "KT_RUN_DIR": str(tmp_path / "run")}
    retry = {"KT_DOWNLOAD_RETRIES": "0", "HTTP_PROXY": f"http://me:{SECRET}@127.0.0.1:9"}
    line = fails("download", KT_MODEL_PATH=str(tmp_path / "m"), **settings, **retry)
    assert "cannot reach http://***@127.0.0.1:9" in line
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert SECRET not in line + kept.decode()
