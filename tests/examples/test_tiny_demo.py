"""What the demo says, and what the README says of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from deploy.state import StageState
from examples.tiny import demo

REPOSITORY = Path(__file__).resolve().parents[2]


class LoadsThenServes(BaseHTTPRequestHandler):
    """503 twice, then 200."""

    answers: ClassVar[Iterator[int]]

    def do_GET(self) -> None:
        self.send_response(next(self.answers))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_it_says_what_a_loading_server_is_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a busy machine the demo said nothing for minutes."""
    monkeypatch.setattr(demo, "TELL_SECONDS", 0.0)
    StageState(tmp_path, "serve").set("warming up")
    LoadsThenServes.answers = iter((503, 503, 200))
    with (
        HTTPServer(("127.0.0.1", 0), LoadsThenServes) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        demo.wait_until_healthy(process, url, tmp_path / "serve.log", tmp_path)
        server.shutdown()
        process.kill()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"warming up, \d+ s so far", line) for line in lines)


def test_the_readme_serves_what_the_demo_made() -> None:
    """Its command names the demo's directories, and stands on the usual port."""
    text = (REPOSITORY / "README.md").read_text("utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^(KT_DEVICE=cpu .*) \.venv/bin/python entrypoint\.py serve$", text, re.M)
    told = dict(word.split("=", 1) for word in line.split())
    made = demo.settings(Path(".demo"), "http://hub", 1)
    assert told == {name: made[name] for name in told}
    assert {"KT_MODEL_PATH", "KT_WEIGHT_PATH"} <= told.keys()
