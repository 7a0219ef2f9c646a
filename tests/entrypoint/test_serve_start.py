"""What ``serve`` becomes, short of becoming it."""

from __future__ import annotations

import os

import pytest

from deploy import serve
from deploy.argv import Command, serve_command
from deploy.config import load
from tests.entrypoint.helpers import LAPTOP, fails, run


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


def test_bytes_that_are_no_text_are_refused() -> None:
    """SGLang ended with a traceback when it handed the path to its scheduler."""
    settings = {"KT_DEVICE": "cpu", "KT_MODEL_PATH": os.fsdecode(b"/models/\xfc")}
    printed = run("serve", "--print", PYTHONIOENCODING="ascii", **settings)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert "--model '/models/\\udcfc'" in printed.stdout
    line = fails("serve", **settings)
    assert line.startswith("error: KT_MODEL_PATH: expected text in UTF-8")
