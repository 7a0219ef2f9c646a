"""Fixtures of the entrypoint's tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from examples.tiny.hub import Hub, HubOptions
from examples.tiny.make_checkpoint import make_checkpoint
from tests.entrypoint.helpers import REPO_ID, LocalHub, Prepared, run, write_repository


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
