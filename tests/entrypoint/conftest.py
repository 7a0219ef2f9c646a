"""Fixtures of the entrypoint's tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from entrypoint_helpers import REPO_ID, write_repository

from examples.tiny.hub import Hub, HubOptions


@dataclass
class LocalHub:
    """A running hub with one repository.

    Attributes:
        endpoint: for HF_ENDPOINT.
        folder: the repository's files; changing one makes a new revision.
        needed: names of the files that a download must fetch.
        options: what the hub refuses and breaks; may be changed while it runs.
    """

    endpoint: str
    folder: Path
    needed: list[str]
    options: HubOptions
    log: io.StringIO
    hub: Hub

    def log_lines(self) -> list[str]:
        """Requests so far: method, path, status, body bytes."""
        return self.log.getvalue().splitlines()

    def forget(self) -> None:
        """Empty the log."""
        self.log.seek(0)
        self.log.truncate()

    @property
    def revision(self) -> str:
        """Commit of the branch main."""
        return self.hub.repositories.snapshot(REPO_ID).revision

    def settings(self, directory: Path, **more: str) -> dict[str, str]:
        """Settings of a download from here."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(directory.parent / "hf-home"),
            "KT_MODEL_ID": REPO_ID,
            "KT_MODEL_PATH": str(directory),
            **more,
        }


@pytest.fixture
def start_hub(tmp_path: Path) -> Iterator[Callable[..., LocalHub]]:
    """Start a hub with a repository of ``shards`` files of ``shard_bytes``."""
    with ExitStack() as stack:

        def start(shards: int = 4, shard_bytes: int = 300_000, **options: object) -> LocalHub:
            folder = tmp_path / "hub" / REPO_ID
            needed = write_repository(folder, shards, shard_bytes)
            log = io.StringIO()
            chosen = HubOptions(**options)  # type: ignore[arg-type]
            hub = stack.enter_context(Hub(tmp_path / "hub", options=chosen, log=log))
            return LocalHub(hub.endpoint, folder, needed, chosen, log, hub)

        yield start


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> LocalHub:
    """A healthy public hub with a small repository."""
    return start_hub()
