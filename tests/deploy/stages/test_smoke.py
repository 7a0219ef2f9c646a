"""The stage ``smoke`` against a small server that answers as SGLang does."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.deploy.helpers import fails, run
from tests.deploy.tutorial_commands import REQUEST

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


class Answers(ThreadingHTTPServer):
    """Behaviour of the server, and the requests it got."""

    daemon_threads = True
    key: str | None = None
    status = 200
    delay = 0.0
    body: str | None = None
    usage: dict[str, int] | None = USAGE

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that gave up waiting; report anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        time.sleep(self.server.delay)
        wanted = self.server.key
        if wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}":
            self.reply(401, "application/json", '{"error": "Unauthorized"}')
        elif self.server.status != 200:
            message = {"object": "error", "message": "The model is not this", "code": 404}
            self.reply(self.server.status, "application/json", json.dumps(message))
        elif self.server.body is not None:
            self.reply(200, "text/html", self.server.body)
        elif body["stream"]:
            self.reply(200, "text/event-stream", "".join(self.events()))
        else:
            choice = {
                "message": {"content": "Hi there", "reasoning_content": None},
                "finish_reason": "stop",
            }
            answer = {"choices": [choice], "usage": self.server.usage}
            self.reply(200, "application/json", json.dumps(answer))

    def events(self) -> Iterator[str]:
        deltas: list[dict[str, Any]] = [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "well"},
            {"content": "Hi "},
            {"content": "there"},
        ]
        for delta in deltas:
            yield f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"
        last = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        yield f"data: {json.dumps(last)}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': self.server.usage})}\n\n"
        yield "data: [DONE]\n\n"

    def reply(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def answers() -> Iterator[Answers]:
    with ExitStack() as stack:
        server = stack.enter_context(Answers())
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield server


def port(answers: Answers) -> str:
    return str(answers.server_address[1])


def test_the_tutorials_request_both_ways(answers: Answers) -> None:
    result = run("smoke", KT_PORT=port(answers))
    assert (result.returncode, result.stderr) == (0, "")
    whole, streamed = answers.requests
    assert whole == json.loads(REQUEST)
    assert streamed == {**whole, "stream": True, "stream_options": {"include_usage": True}}
    lines = result.stdout.splitlines()
    assert lines[0] == "answer: 'Hi there'"
    assert lines[1].startswith("  5 prompt tokens, 3 answer tokens (stop), ")
    assert "tokens/s" in lines[1]
    assert lines[2] == "streamed answer: 'Hi there'"
    assert lines[3] == "  reasoning: 'well'"
    assert "first token after" in lines[4]


def test_settings_of_the_request(answers: Answers) -> None:
    result = run(
        "smoke",
        "--base-url",
        f"http://127.0.0.1:{port(answers)}/",
        KT_SMOKE_MAX_TOKENS="16",
        KT_SERVED_MODEL_NAME="mine",
    )
    assert result.returncode == 0
    assert answers.requests[0]["max_tokens"] == 16
    assert answers.requests[0]["model"] == "mine"


def test_a_key(answers: Answers) -> None:
    answers.key = "sk-secret"
    assert run("smoke", KT_PORT=port(answers), KT_API_KEY="sk-secret").returncode == 0
    line = fails("smoke", KT_PORT=port(answers))
    assert "answers HTTP 401" in line
    assert "set KT_API_KEY" in line


def test_a_proxy_is_not_asked(answers: Answers) -> None:
    result = run("smoke", KT_PORT=port(answers), HTTP_PROXY="http://127.0.0.1:9")
    assert result.returncode == 0


def test_no_server() -> None:
    line = fails("smoke", KT_PORT="9")
    assert line.startswith("error: no server at http://127.0.0.1:9: start it with")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, "answers HTTP 404: The model is not this"),
        ({"body": "<html>"}, "does not answer as an OpenAI-compatible server"),
        ({"body": '{"choices": []}'}, "does not answer as an OpenAI-compatible server"),
        ({"delay": 3.0}, "sent nothing for 0.5 s"),
    ],
)
def test_bad_answers(answers: Answers, change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        setattr(answers, name, value)
    assert message in fails("smoke", KT_PORT=port(answers), KT_SMOKE_TIMEOUT="0.5")


def test_an_answer_without_tokens(answers: Answers) -> None:
    answers.usage = {"prompt_tokens": 5, "completion_tokens": 0}
    result = run("smoke", KT_PORT=port(answers))
    assert result.returncode == 2
    assert "answered without a single token" in result.stderr


def test_ipv6_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.settings.config import load
    from deploy.stages.health import base_url

    address: Callable[..., str] = lambda host: base_url(load({"KT_HOST": host}))  # noqa: E731
    assert address("0.0.0.0") == "http://127.0.0.1:30000"
    assert address("::") == "http://[::1]:30000"
    assert address("fe80::1") == "http://[fe80::1]:30000"
    assert address("example") == "http://example:30000"
