"""Which exceptions of SGLang's handlers are told as the client's mistake."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import jinja2
import pydantic
import pytest

from kt_kernel.sglang_plugin.edge.http import Message
from kt_kernel.sglang_plugin.edge.mistakes import Mistakes, handed_on, in_one_line, tell_mistake


def ask(application: Any, path: str = "/api/chat") -> tuple[int, str]:
    """Status and message of the answer; raises what passes the middleware."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(Mistakes(application)(scope, receive, send))
    body = json.loads(b"".join(message["body"] for message in sent[1:]))
    return sent[0]["status"], body["message"]


def raising(error: Exception, before: Any = None) -> Any:
    async def application(scope: Message, receive: Any, send: Any) -> None:
        if before is not None:
            before()
        raise error

    return application


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no template"),
        KeyError("role"),
        jinja2.TemplateError("roles must alternate"),
        NotImplementedError("Unknown role: function"),
        RecursionError("too deep"),
    ],
)
def test_what_cannot_be_converted_is_the_clients(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        status, message = ask(raising(error))
    assert status == 400
    assert f"{type(error).__name__}: {error}" in message
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), OSError("no file"), RuntimeError("CUDA error")])
def test_other_faults_stay_the_servers(error: Exception) -> None:
    with pytest.raises(type(error)):
        ask(raising(error))


def test_what_fails_after_the_conversion_is_the_servers() -> None:
    with pytest.raises(KeyError):
        ask(raising(KeyError("out"), before=handed_on))


def test_the_administrators_routes_are_left_alone() -> None:
    with pytest.raises(KeyError):
        ask(raising(KeyError("x")), "/flush_cache")


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    async def application(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("x")

    with pytest.raises(KeyError):
        ask(application)


@pytest.mark.parametrize("name", ["err_type", "error_type"])
def test_a_fault_that_a_handler_tells_itself(name: str) -> None:
    """With SGLang's functions for OpenAI's and for Anthropic's errors."""
    told: list[dict[str, Any]] = []

    def answer(serving: object, **fields: Any) -> None:
        told.append(fields)

    def first(serving: object, message: str, **fields: Any) -> None:
        told.append(fields | {"message": message})

    async def application(scope: Message, receive: Any, send: Any) -> None:
        for error in (KeyError("role"), OSError("disk")):
            try:
                raise error
            except Exception:
                tell_mistake(answer, None, **{name: "x"}, status_code=500, message="internal")
        tell_mistake(answer, None, **{name: "x"}, status_code=500, message="no exception")
        try:
            raise ValueError("a\nb")
        except ValueError:
            tell_mistake(first, None, "internal", err_type="x", status_code=500)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"message": ""}'})

    ask(application)
    mistake, disk, without, positional = told
    assert "ValueError: a b;" in positional["message"]
    assert (mistake["status_code"], mistake[name]) == (400, "invalid_request_error")
    assert "KeyError: 'role'" in mistake["message"]
    assert disk == {name: "x", "status_code": 500, "message": "internal"}
    assert without["status_code"] == 500


class DS32EncodingError(Exception):
    """As SGLang names its encoder's."""


WITHOUT_CALL = "messages: found a tool's result without its call, expected an assistant's message"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "Tool 0: 'str' is not of type 'object'\n\nFailed validating",
            "Tool 0: 'str' is not of type 'object'",
        ),
        ("Invalid messages at 1:\n{'role': 'system', 'content': ''}", WITHOUT_CALL),
        ("No tool calls but found tool output", WITHOUT_CALL),
        ("Invalid message for role `developer`: {'role'", "messages: found a developer's message"),
        ("schema_ is required for", "response_format.json_schema.schema: found none, expected"),
        ("Messages cannot be empty.", "Messages cannot be empty."),
    ],
)
@pytest.mark.parametrize("positional", [True, False])
def test_what_a_handler_says_of_a_request_is_one_line(
    said: str, told: str, positional: bool
) -> None:
    """It quoted JSON Schema's own schema, and messages that nobody had sent."""
    answered: list[str] = []

    def answer(serving: object, message: str, **_: Any) -> None:
        answered.append(message)

    if positional:
        tell_mistake(answer, None, said)
    else:
        tell_mistake(answer, None, message=said, err_type="BadRequest", status_code=400)
    assert answered[0].startswith(told)
    assert "\n" not in answered[0]


def test_what_the_encoder_raises_on_other_routes_is_told_the_same() -> None:
    error = DS32EncodingError("Invalid messages at 1:\n{'role': 'system', 'content': ''}")
    assert ask(raising(error))[1].startswith(WITHOUT_CALL)


def test_a_validation_that_a_handler_does_itself_is_told_of_the_field() -> None:
    """/v1/responses makes a chat of its input, and told all lines of pydantic's error."""

    class Chat(pydantic.BaseModel):
        n: int
        m: int

    with pytest.raises(pydantic.ValidationError) as raised:
        Chat.model_validate({"n": "x", "m": 1})
    for said in (str(raised.value), f"{raised.value} {raised.value.__cause__}"):
        assert in_one_line(said, raised.value) == 'n: found "x", expected an integer'
    assert in_one_line("n is bad None", ValueError("n is bad")) == "n is bad"


def test_a_body_that_fastapi_did_not_read_is_told_by_its_content_type() -> None:
    """/invocations takes whatever comes, and told of an attribute of bytes."""
    error = AttributeError("'bytes' object has no attribute 'get'")
    assert ask(raising(error), "/invocations")[1].startswith("content-type: found none, expected")
