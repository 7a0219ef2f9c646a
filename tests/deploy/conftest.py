"""Fixtures of the entrypoint's tests."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from examples.tiny.hub import Hub, HubOptions
from examples.tiny.make_checkpoint import make_checkpoint
from tests.deploy.helpers import REPO_ID, LocalHub, Prepared, run, write_repository


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The tiny checkpoint, converted both ways by the stage ``convert``."""
    folder = tmp_path_factory.mktemp("prepared")
    made = Prepared(folder / "model", folder / "int4", folder / "int8")
    make_checkpoint(made.model)
    for method, path in (("int4", made.int4), ("int8", made.int8)):
        result = run(
            "convert",
            KT_MODEL_PATH=str(made.model),
            KT_WEIGHT_PATH=str(path),
            KT_QUANT_METHOD=method,
        )
        assert result.returncode == 0, result.stderr
    return made


@pytest.fixture
def start_hub(tmp_path: Path) -> Iterator[Callable[..., LocalHub]]:
    """Start a hub with a repository of ``shards`` files of ``shard_bytes``."""
    with ExitStack() as stack:

        def start(shards: int = 4, shard_bytes: int = 300_000, **options: Any) -> LocalHub:
            folder = tmp_path / "hub" / REPO_ID
            needed = write_repository(folder, shards, shard_bytes)
            log = io.StringIO()
            chosen = HubOptions(**options)
            hub = stack.enter_context(Hub(tmp_path / "hub", options=chosen, log=log))
            return LocalHub(hub.endpoint, folder, needed, chosen, log, hub)

        yield start


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> LocalHub:
    """A healthy public hub with a small repository."""
    return start_hub()


class _Answer(http.server.BaseHTTPRequestHandler):
    status: ClassVar[int] = 200
    path_asked: ClassVar[str] = "/health"
    body: ClassVar[object] = None

    def do_GET(self) -> None:
        assert self.path == self.path_asked
        self.send_response(self.status)
        self.end_headers()
        if self.body is not None:
            self.wfile.write(json.dumps(self.body).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(handler: type[_Answer]) -> Iterator[str]:
    """The port of a server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield str(running.server_address[1])
        running.shutdown()


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """Something that answers /health with a status, as SGLang's server does."""
    with answering(_Answer) as running:

        def port(status: int) -> str:
            _Answer.status = status
            return running

        yield port


class _Router(_Answer):
    path_asked = "/readiness"


@pytest.fixture
def router() -> Iterator[Callable[[int, object], str]]:
    """The URL of something that answers with a status and JSON, as SGLang's router does."""
    with answering(_Router) as running:

        def url(status: int, body: object) -> str:
            _Router.status, _Router.body = status, body
            return f"http://127.0.0.1:{running}/readiness"

        yield url
