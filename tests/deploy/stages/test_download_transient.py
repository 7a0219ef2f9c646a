"""The stage ``download`` while the Hub, or what stands before it, fails for a moment or answers
with something else."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any, cast

import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile as ListedFile

from deploy.hub.client import list_files
from deploy.hub.http_client import looks_like_a_page, through_proxy
from deploy.hub.retries import LONGEST_RETRY_AFTER, HubUnreachable, retry_after, with_retries
from examples.tiny.hub import HubHandler
from kt_kernel.errors import UserError
from tests.deploy.helpers import REPOSITORY, LocalHub, clean_environment, fails, fetched

PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
REQUESTS = {
    "revision": "/revision/main",
    "listing": "/tree/",
    "index": "model.safetensors.index.json",
    "shard": "model-00002-of-000004.safetensors",
}
#: The stage without the waiting.
IMPATIENT = """
import sys
import deploy.hub.retries as retries
retries.FIRST_WAIT = retries.LONGEST_WAIT = 0.01
from deploy.command_line import main
sys.exit(main(["download"]))
"""


def answer_first(hub: LocalHub, part: str, *answers: Callable[[HubHandler], None]) -> list[str]:
    """Let the hub answer requests whose path contains ``part`` with these first.

    Returns:
        the paths asked for, as they come.
    """
    left, asked = list(answers), list[str]()

    class Handler(HubHandler):
        def do_GET(self) -> None:
            if part in self.path:
                asked.append(self.path)
                if left:
                    left.pop(0)(self)
                    return
            super().do_GET()

        do_HEAD = do_GET

    hub.hub.RequestHandlerClass = Handler
    return asked


def send(status: int, body: bytes = b"", /, length: int = 0, **headers: str) -> Callable[..., None]:
    """An answer; ``length`` is what it says of its length, if that is more than the body."""

    def answer(handler: HubHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(length or len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = length > len(body)

    return answer


def reset(handler: HubHandler) -> None:
    """End the connection without an answer."""
    handler.close_connection = True


def impatient(hub: LocalHub, model: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT],
        env=clean_environment(**hub.settings(model, **more)),
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("request_kind", REQUESTS)
def test_what_may_pass_is_asked_again(hub: LocalHub, tmp_path: Path, request_kind: str) -> None:
    file = hub.folder / REQUESTS[request_kind]
    whole = file.read_bytes() if file.is_file() else b"[{" + b" " * 200
    failures = (
        send(503),
        send(429, b"", Retry_After="0"),
        send(429, b"", Retry_After=formatdate(time.time() - 5, usegmt=True)),
        reset,
        send(200, whole[:100], length=len(whole)),
    )
    asked = answer_first(hub, REQUESTS[request_kind], *failures)
    result = impatient(hub, tmp_path / "model")
    assert result.returncode == 0, result.stderr
    assert len(asked) == len(failures) + 1
    assert result.stderr.count("warning: ") == len(failures)
    for name in hub.needed:
        assert (tmp_path / "model" / name).read_bytes() == (hub.folder / name).read_bytes()


def test_the_number_of_retries_is_the_settings(hub: LocalHub, tmp_path: Path) -> None:
    asked = answer_first(hub, "/tree/", *[send(503)] * 9)
    result = impatient(hub, tmp_path / "model", KT_DOWNLOAD_RETRIES="2")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {hub.endpoint} answers HTTP 503")
    assert len(asked) == 3


def test_a_refusal_is_not_asked_again(hub: LocalHub, tmp_path: Path) -> None:
    asked = answer_first(hub, "index.json", *[send(410)] * 3)
    assert "answers HTTP 410" in fails("download", **hub.settings(tmp_path / "model"))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("request_kind", "answer"),
    [
        ("revision", send(200, PAGE, Content_Type="text/html; charset=utf-8")),
        ("listing", send(200, PAGE, Content_Type="application/json")),
        ("listing", send(403, PAGE, Content_Type="text/html")),
        ("index", send(302, b"", Location="/login")),
        ("shard", send(200, PAGE)),
    ],
)
def test_a_login_page_is_named(
    hub: LocalHub, tmp_path: Path, request_kind: str, answer: Callable[[HubHandler], None]
) -> None:
    asked = answer_first(hub, REQUESTS[request_kind], answer)
    if request_kind == "index":
        seen = hub.hub.RequestHandlerClass

        class WithLogin(seen):  # type: ignore[misc, valid-type]
            def do_GET(self) -> None:
                if self.path.endswith("/login"):
                    send(200, PAGE, Content_Type="text/html")(self)
                else:
                    super().do_GET()

        hub.hub.RequestHandlerClass = WithLogin
    # The hub is its own proxy.
    settings = hub.settings(tmp_path / "model", http_proxy=hub.endpoint)
    line = fails("download", **settings)
    assert f"{hub.endpoint} through the proxy {hub.endpoint} answers with a web page" in line
    assert "login page" in line
    assert "HF_ENDPOINT" in line
    assert len(asked) == 1
    assert not list((tmp_path / "model").glob("*.safetensors")) or request_kind == "shard"


@pytest.mark.parametrize(
    "change",
    [
        {"path": 5},
        {"path": "\ud800.json"},
        {"size": -1},
        {"size": "1"},
        {"oid": 5},
        {"lfs": {"oid": 5, "size": 1, "pointerSize": 1}},
    ],
)
def test_a_listing_with_other_types(change: dict[str, object]) -> None:
    entry = {"path": "a.json", "size": 1, "oid": "0" * 40}

    class Api:
        def list_repo_tree(self, *_: object, **__: object) -> list[Any]:
            return [cast(Any, ListedFile)(**fields) for fields in (entry, entry | change)]

    with pytest.raises(UserError, match="sends JSON that is not the Hub's"):
        list_files(cast(HfApi, Api()), "a/b", "1" * 40)


def test_json_of_another_kind(hub: LocalHub, tmp_path: Path) -> None:
    answer_first(hub, "/tree/", send(200, b'{"error": "no"}'))
    line = fails("download", **hub.settings(tmp_path / "model"))
    assert f"{hub.endpoint} sends JSON that is not the Hub's" in line


def test_a_rest_that_the_hub_does_not_send(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    """A server without ranges that breaks off ends the download; it does not go on forever."""
    hub = start_hub(shards=1, drop_after=100_000)

    class NoRanges(HubHandler):
        def _range(self, size: int) -> tuple[int, int]:
            return 0, size

    hub.hub.RequestHandlerClass = NoRanges
    result = impatient(hub, tmp_path / "model", KT_DOWNLOAD_RETRIES="2")
    assert result.returncode == 2
    assert fetched(hub.log_lines())["model-00001-of-000001.safetensors"] == 3


def test_retry_after() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    in_a_minute = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "9" * 5000}) == LONGEST_RETRY_AFTER
    for nothing in ("soon", "-5", "1e9", "Mon, 01 Jan 99999999999 00:00:00 GMT"):
        assert retry_after({"retry-after": nothing}) is None
    assert retry_after({"ratelimit": '"api";r=0;t=55'}) == 55
    assert retry_after({"ratelimit": '"api";r=3;t=55'}) is None
    assert retry_after({"ratelimit": f'"api";r=0;t={"9" * 5000}'}) is None
    assert retry_after({}) is None


def test_progress_gives_new_attempts() -> None:
    reached = iter([0, 1, 2, 2, 2])

    def fail() -> None:
        raise HubUnreachable("gone", "wait", wait=0)

    with pytest.raises(HubUnreachable):
        with_retries(fail, 2, lambda: next(reached))
    assert next(reached, None) is None


def test_the_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert through_proxy("https://hub") == ""
    monkeypatch.setenv("ALL_PROXY", "http://me:secret@proxy:3128")
    assert through_proxy("https://hub") == " through the proxy http://proxy:3128"
    for address in ("me:secret@proxy:3128", "http://me:sec@re/t@proxy:3128", "me:a://b@proxy:3128"):
        monkeypatch.setenv("ALL_PROXY", address)
        shown = through_proxy("https://hub")
        assert shown.endswith("proxy:3128")
        assert "@" not in shown
    monkeypatch.setenv("NO_PROXY", "hub")
    assert through_proxy("https://hub") == ""


def test_what_a_page_looks_like() -> None:
    for page in (PAGE, b"<html>", b"\xef\xbb\xbf<!-- x --> <HTML lang=en>", b"<?xml x?>\n<html>"):
        assert looks_like_a_page(page)
    for other in (b'{"a": "<html>"}', b"<svg>", b"", b"# A model"):
        assert not looks_like_a_page(other)
