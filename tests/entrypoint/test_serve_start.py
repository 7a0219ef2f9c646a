"""What ``serve`` becomes, short of becoming it."""

from __future__ import annotations

import pytest

from deploy import serve
from deploy.argv import Command, serve_command
from deploy.config import load
from tests.entrypoint.helpers import LAPTOP


def test_the_server_gets_the_variables_that_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Command, dict[str, str]]] = []
    monkeypatch.setattr(serve, "export", lambda _: None)  # it would change this process
    monkeypatch.setattr(serve, "check_registered", lambda: None)
    monkeypatch.setattr(serve, "survey", lambda: LAPTOP)
    monkeypatch.setattr(serve, "run_checks", lambda *_: [])
    monkeypatch.setattr(serve, "become", lambda *words: started.append(words))
    config = load({"KT_DEVICE": "cpu", "OTHER": "kept"}, [], "serve")
    serve.run(config, print_only=False, as_json=False)
    ((command, environment),) = started
    wanted = serve_command(config, LAPTOP)
    assert command == wanted
    assert wanted.environment["KT_DEVICE"] == "cpu"
    assert environment == {"KT_DEVICE": "cpu", "OTHER": "kept", **wanted.environment}
