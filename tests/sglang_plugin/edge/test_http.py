"""A body is checked once, wherever it is sent, and handed on as it came."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from kt_kernel.sglang_plugin.edge import http
from kt_kernel.sglang_plugin.edge.http import CheckedRequests, Message
from kt_kernel.sglang_plugin.edge.kinds import Limits

BAD = {"top_k": 2**40}


async def application(scope: Message, receive: Any, send: Any) -> None:
    """Answers with what it was sent, and what comes after that."""
    body, more = b"", True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        body += message.get("body", b"")
        more = message.get("more_body", False)
    after = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body + b"|" + after["type"].encode()})


def ask(
    body: bytes, path: str = "/generate", method: str = "POST", pieces: int = 1, **headers: str
) -> tuple[int, bytes]:
    """Status and body of the answer to a request that arrives in so many pieces."""
    size = -(-len(body) // pieces) or 1
    parts = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages: list[Message] = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ]
    messages.append({"type": "http.disconnect"})
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    headers.setdefault("content-length", str(len(body)))
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(CheckedRequests(application, lambda: Limits(100, 100))(scope, receive, send))
    if not sent:
        return 0, b""
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize(
    "body", [b'{"top_k": 5}', b"not JSON", b"null?", b'{"user": "null"}', b"", b"\xff"]
)
@pytest.mark.parametrize("pieces", [1, 3])
def test_what_is_not_refused_arrives_unchanged(body: bytes, pieces: int) -> None:
    """After it the application still learns that the client went."""
    assert ask(body, pieces=pieces) == (200, body + b"|http.disconnect")


def test_null_is_the_default_of_a_field() -> None:
    """SGLang refuses it in some, where OpenAI's clients write it."""
    body = b'{"stream": null, "messages": [{"content": null}], "n": 1, "user": "null"}'
    kept = b'{"messages": [{"content": null}], "n": 1, "user": "null"}'
    assert ask(body) == (200, kept + b"|http.disconnect")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "GET"])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
def test_every_method_and_content_type_is_checked(method: str, content_type: str) -> None:
    status, _ = ask(json.dumps(BAD).encode(), method=method, content_type=content_type)
    assert status == 400


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/chat/completions", ["message"]),
        ("/generate", ["error", "message"]),
        ("/v1/responses", ["error", "message"]),
        ("/v1/messages", ["error", "message"]),
        ("/some/route/of/tomorrow", ["message"]),
    ],
)
def test_the_answer_has_the_routes_shape(path: str, keys: list[str]) -> None:
    status, content = ask(json.dumps(BAD).encode(), path)
    answer = json.loads(content)
    for key in keys:
        answer = answer[key]
    assert status == 400
    assert answer.startswith("top_k: found 1099511627776, expected -1 or an integer from 1 to")


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"n": ' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"a": ' * 200 + b"1" + b"}" * 200,
        b"null",
        b"[1, 2]",
    ],
    ids=["nan", "infinity", "large", "digits", "brackets", "braces", "null", "list"],
)
def test_what_one_parser_takes_and_another_does_not(body: bytes) -> None:
    assert ask(body)[0] == 400


def test_files_and_requests_without_a_body_are_left_alone() -> None:
    form = b'{"top_k": -5}'
    assert ask(form, content_type="multipart/form-data; boundary=x")[0] == 200

    async def no_body(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def never() -> Message:
        raise AssertionError("waits for a body that nobody sends")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    asyncio.run(CheckedRequests(no_body, lambda: Limits(1, 1))(scope, never, send))
    asyncio.run(CheckedRequests(no_body, lambda: Limits(1, 1))({"type": "lifespan"}, never, send))
    assert [message["status"] for message in sent] == [204, 204]


@pytest.mark.parametrize(("path", "served"), [("/start", 0), ("/start/", 0), ("/started", 1)])
def test_a_route_that_would_end_the_server_is_not_served(path: str, served: int) -> None:
    """A plain GET, which has no body to check."""
    calls: list[str] = []
    sent: list[Message] = []

    async def route(scope: Message, receive: Any, send: Any) -> None:
        calls.append(scope["path"])

    async def send(message: Message) -> None:
        sent.append(message)

    async def never() -> Message:
        raise AssertionError("waits for a body that nobody sends")

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(CheckedRequests(route, lambda: Limits(1, 1), {"/start"})(scope, never, send))
    assert len(calls) == served
    assert [message["status"] for message in sent[:1]] == ([] if served else [400])


def test_a_body_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in memory until it is answered."""
    monkeypatch.setattr(http, "MAX_BODY", 100)
    assert ask(b"x" * 100)[0] == 200
    status, answer = ask(b"x" * 10_000, pieces=20)
    assert status == 413
    assert b"expected at most 100" in answer


def test_a_client_that_goes_while_it_sends_is_not_answered() -> None:
    sent: list[Message] = []

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(CheckedRequests(application, lambda: Limits(1, 1))(scope, gone, send))
    assert sent == []
