"""The local Hub, asked by the real client (huggingface_hub) and by plain HTTP."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from examples.tiny.hub import Hub, HubOptions, main
from kt_kernel.errors import UserError

REPO = "deepseek-ai/DeepSeek-V3.2-tiny"
REPO_ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tiny_fp8: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_fp8, tmp_path / "hub" / REPO)
    return tmp_path / "hub"


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of each file, without the client's own .cache."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def file_requests(log: str, method: str = "GET") -> list[tuple[str, int, int]]:
    """(file, status, bytes sent) of each request for a file."""
    pattern = rf"^{method} /\S+/resolve/[^/]+/(\S+) (\d+) (\d+)$"
    return [(n, int(s), int(b)) for n, s, b in re.findall(pattern, log, re.MULTILINE)]


def test_client_downloads_the_whole_model(root: Path, tmp_path: Path) -> None:
    with Hub(root) as hub:
        snapshot_download(REPO, endpoint=hub.endpoint, local_dir=tmp_path / "model", token=False)
    assert contents(tmp_path / "model") == contents(root / REPO)


def test_client_downloads_by_revision_into_its_cache(root: Path, tmp_path: Path) -> None:
    with Hub(root) as hub:
        revision = HfApi(hub.endpoint).model_info(REPO, token=False).sha
        assert re.fullmatch(r"[0-9a-f]{40}", revision or "")
        folder = snapshot_download(
            REPO,
            revision=revision,
            endpoint=hub.endpoint,
            cache_dir=tmp_path / "cache",
            token=False,
        )
    assert Path(folder).name == revision
    assert contents(Path(folder)) == contents(root / REPO)


def test_nothing_is_downloaded_twice(root: Path, tmp_path: Path) -> None:
    log = io.StringIO()
    with Hub(root, log=log) as hub:
        for _ in range(2):
            snapshot_download(REPO, endpoint=hub.endpoint, local_dir=tmp_path / "m", token=False)
    names = sorted(name for name, _, _ in file_requests(log.getvalue()))
    assert names == sorted(path.name for path in (root / REPO).iterdir())


def test_unknown_names_are_the_clients_errors(root: Path, tmp_path: Path) -> None:
    with Hub(root) as hub:
        where: dict[str, Any] = {
            "endpoint": hub.endpoint,
            "local_dir": tmp_path / "model",
            "token": False,
        }
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("deepseek-ai/DeepSeek-V9", **where)
        for revision in ("v1.0", "0" * 40):
            with pytest.raises(RevisionNotFoundError):
                snapshot_download(REPO, revision=revision, **where)
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(REPO, "pytorch_model.bin", **where)


def test_changed_file_is_a_new_revision(root: Path) -> None:
    with Hub(root) as hub:
        api = HfApi(hub.endpoint, token=False)
        before = api.model_info(REPO).sha
        (root / REPO / "config.json").write_text("{}")
        after = api.model_info(REPO).sha
        assert before != after
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=before)


def big_file(root: Path, nbytes: int) -> bytes:
    """Add a repository org/big with one file of ``nbytes``, and return its content."""
    content = bytes(range(251)) * (nbytes // 251 + 1)
    (root / "org" / "big").mkdir(parents=True)
    (root / "org" / "big" / "model.safetensors").write_bytes(content[:nbytes])
    return content[:nbytes]


def test_client_resumes_after_a_cut_connection(tmp_path: Path) -> None:
    # Larger than the 10 MiB that the client reads at once: less than that it throws away.
    content = big_file(tmp_path, 24 << 20)
    log = io.StringIO()
    options = HubOptions(drop_after=11 << 20, drop_times=1)
    with Hub(tmp_path, options=options, log=log) as hub:
        snapshot_download(
            "org/big", endpoint=hub.endpoint, local_dir=tmp_path / "model", token=False
        )
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == content
    assert file_requests(log.getvalue()) == [
        ("model.safetensors", 200, 11 << 20),
        ("model.safetensors", 206, 14 << 20),
    ]


def test_download_that_failed_for_good_is_finished_later(root: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"local_dir": tmp_path / "model", "token": False}
    with (
        Hub(root, options=HubOptions(drop_after=1 << 20)) as hub,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        snapshot_download(REPO, endpoint=hub.endpoint, **where)
    done = contents(tmp_path / "model")
    assert 0 < len(done) < len(contents(root / REPO))
    log = io.StringIO()
    with Hub(root, log=log) as hub:
        snapshot_download(REPO, endpoint=hub.endpoint, **where)
    assert contents(tmp_path / "model") == contents(root / REPO)
    assert not set(done) & {name for name, _, _ in file_requests(log.getvalue())}


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_killed_client_goes_on_where_it_stopped(root: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from huggingface_hub import snapshot_download as d; "
        "d(sys.argv[1], endpoint=sys.argv[2], local_dir=sys.argv[3], token=False, max_workers=1)"
    )
    log = io.StringIO()
    model = tmp_path / "model"
    with Hub(root, options=HubOptions(rate=2e6), log=log) as hub:
        command = [sys.executable, "-c", script, REPO, hub.endpoint, str(model)]
        client = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # Its first shard is there and the second under way.
        wait_until(lambda: len(list(model.glob("*.safetensors"))) == 1)
        wait_until(lambda: "model-00002" in "".join(file[0] for file in head_requests(log)))
        client.kill()
        client.wait()
        done = contents(model)
        assert len(done) < len(contents(root / REPO))
        wait_until(hub.is_idle)
        begin = len(log.getvalue())
        hub.options.rate = None
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert contents(model) == contents(root / REPO)
    assert not set(done) & {name for name, _, _ in file_requests(log.getvalue()[begin:])}


def head_requests(log: io.StringIO) -> list[tuple[str, int, int]]:
    return file_requests(log.getvalue(), "HEAD")


def test_token_is_asked_for_as_by_a_gated_model(root: Path, tmp_path: Path) -> None:
    options = HubOptions(token="hf_good", forbidden_token="hf_other")
    with Hub(root, options=options) as hub:
        where: dict[str, Any] = {"endpoint": hub.endpoint, "local_dir": tmp_path / "model"}
        for token in (False, "hf_other"):
            with pytest.raises(GatedRepoError) as refusal:
                snapshot_download(REPO, token=token, **where)
            assert refusal.value.response.status_code == (403 if token else 401)
        with pytest.raises(HfHubHTTPError, match="401"):
            snapshot_download(REPO, token="hf_typo", **where)
        assert contents(tmp_path / "model") == {}
        snapshot_download(REPO, token="hf_good", **where)
    assert contents(tmp_path / "model") == contents(root / REPO)


@pytest.mark.parametrize(
    ("asked", "status", "begin", "end"),
    [
        (None, 200, 0, 1000),
        ("bytes=100-199", 206, 100, 200),
        ("bytes=900-", 206, 900, 1000),
        ("bytes=900-5000", 206, 900, 1000),
        ("bytes=-10", 206, 990, 1000),
        ("bytes=0-", 200, 0, 1000),
        ("bytes=1000-", 416, 0, 0),
        ("bytes=20-10", 416, 0, 0),
    ],
)
def test_ranges(tmp_path: Path, asked: str | None, status: int, begin: int, end: int) -> None:
    content = big_file(tmp_path, 1000)
    with Hub(tmp_path) as hub:
        url = f"{hub.endpoint}/org/big/resolve/main/model.safetensors"
        answer = httpx.get(url, headers={"Range": asked} if asked else {})
    assert answer.status_code == status
    if status == 416:
        assert "1000 bytes" in answer.headers["X-Error-Message"]
        return
    assert answer.content == content[begin:end]
    if status == 206:
        assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/1000"


def test_head_tells_what_get_would_send(root: Path) -> None:
    size = (root / REPO / "model-00001-of-000005.safetensors").stat().st_size
    with Hub(root) as hub:
        base = f"{hub.endpoint}/{REPO}/resolve/main"
        shard = httpx.head(f"{base}/model-00001-of-000005.safetensors")
        config = httpx.head(f"{base}/config.json")
        revision = HfApi(hub.endpoint, token=False).model_info(REPO).sha
    for answer in (shard, config):
        assert answer.status_code == 200
        assert answer.content == b""
        assert answer.headers["X-Repo-Commit"] == revision
    assert shard.headers["Content-Length"] == shard.headers["X-Linked-Size"] == str(size)
    assert re.fullmatch(r'"[0-9a-f]{64}"', shard.headers["X-Linked-Etag"])
    # Small files are git objects; git itself says which.
    git = subprocess.run(
        ["git", "hash-object", "--no-filters", root / REPO / "config.json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert config.headers["ETag"] == f'"{git.stdout.strip()}"'


def test_only_the_repositories_files_are_served(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (root / REPO / ".cache").mkdir()
    (root / REPO / ".cache" / "token").write_text("secret")
    names = ["../../../secret", "%2e%2e/%2e%2e/%2e%2e/secret", ".cache/token"]
    with Hub(root) as hub:
        host, port = hub.endpoint.removeprefix("http://").split(":")
        for name in names:
            with socket.create_connection((host, int(port))) as connection:
                request = f"GET /{REPO}/resolve/main/{name} HTTP/1.1\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode())
                answer = connection.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 404"), name
            assert b"X-Error-Code: EntryNotFound" in answer


def test_rate_limits_each_response(tmp_path: Path) -> None:
    content = big_file(tmp_path, 1 << 20)
    with Hub(tmp_path, options=HubOptions(rate=2 << 20)) as hub:
        started = time.monotonic()
        answer = httpx.get(f"{hub.endpoint}/org/big/resolve/main/model.safetensors")
        assert time.monotonic() - started >= 0.49
    assert answer.content == content


def test_command_announces_itself_and_stops_on_sigterm(root: Path, tmp_path: Path) -> None:
    ready, log = tmp_path / "ready", tmp_path / "log"
    command = [sys.executable, "-m", "examples.tiny.hub", "--root", str(root)]
    command += ["--ready-file", str(ready), "--log", str(log)]
    server = subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(ready.exists)
        endpoint = ready.read_text().strip()
        assert endpoint.startswith("http://127.0.0.1:")
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": ""}
        script = f"import huggingface_hub as h; h.snapshot_download('{REPO}', local_dir='m')"
        subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate(timeout=10)
    finally:
        server.kill()
    assert server.returncode == 0
    assert output == f"serving {root} at {endpoint}\n"
    assert not ready.exists()
    assert contents(tmp_path / "m") == contents(root / REPO)
    assert len(file_requests(log.read_text())) == len(contents(root / REPO))


def test_bad_root_and_taken_port_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --root")
    assert error.count("\n") == 1
    with Hub(tmp_path) as hub:
        port = hub.endpoint.split(":")[-1]
        assert main(["--root", str(tmp_path), "--port", port]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
        assert error.count("\n") == 1
        with pytest.raises(UserError, match="another --port"):
            Hub(tmp_path, port=int(port))
