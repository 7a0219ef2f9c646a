"""What pydantic and FastAPI say of a request is told of the fields that the client wrote."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, field_validator, model_validator
from starlette.testclient import TestClient

from kt_kernel.sglang_plugin.edge.mistakes import tell_invalid

# The shapes of SGLang's own: unions whose variants are told apart by a role or a type, validators
# before and after, names of variants that are long.


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Thinking(BaseModel):
    type: Literal["thinking"]
    thinking: str | None = None

    @model_validator(mode="after")
    def has_payload(self) -> Thinking:
        if self.thinking is None:
            raise ValueError("thinking parts require 'thinking'")
        return self


Part = Text | Thinking


class Call(BaseModel):
    function: dict[str, Any]


class Generic(BaseModel):
    role: Literal["system", "assistant"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None

    @field_validator("role", mode="before")
    @classmethod
    def known(cls, role: object) -> object:
        if not isinstance(role, str):
            raise ValueError("'role' must be a string")
        if role not in ("system", "assistant"):
            raise ValueError("'role' must be one of 'system', 'assistant' (in any case).")
        return role

    @model_validator(mode="after")
    def as_it_is(self) -> Generic:
        return self


class User(BaseModel):
    role: Literal["user"]
    content: str | list[Part]

    @model_validator(mode="after")
    def does_not_think(self) -> User:
        if isinstance(self.content, list) and any(isinstance(p, Thinking) for p in self.content):
            raise ValueError("thinking parts are only valid in assistant messages")
        return self


class Function(BaseModel):
    name: str
    key_order: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def in_order(cls, fields: Any) -> Any:
        return {**fields, "key_order": list(fields)} if isinstance(fields, dict) else fields


class Tool(BaseModel):
    function: Function


class Format(BaseModel):
    type: Literal["text", "json_object"]


class Tag(BaseModel):
    type: Literal["text", "structural_tag"] = "structural_tag"
    format: dict[str, Any]


class Chat(BaseModel):
    model: str = "default"
    messages: list[Generic | User]
    tools: list[Tool] | None = None
    tool_choice: Tool | Literal["auto", "none"] = "auto"
    response_format: Format | Tag | None = None
    reasoning_effort: Literal["low", "high"] | Annotated[float, Field(le=1)] | None = None
    n: int = 1

    @model_validator(mode="before")
    @classmethod
    def adds_a_default(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            fields["tool_choice"] = fields.get("tool_choice", "none")
            if fields.get("model") == "bad":
                raise ValueError("no such model")
        return fields


async def wants_json(request: Request) -> None:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        error = {"loc": ["header", "content-type"], "msg": "Unsupported", "type": "value_error"}
        raise RequestValidationError(errors=[error])


async def chat(body: Annotated[Chat, Body()]) -> None: ...


def application() -> TestClient:
    app = FastAPI()
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.post("/chat", dependencies=[Depends(wants_json)])(chat)
    app.post("/plain")(chat)
    return TestClient(app)


CLIENT = application()
USER = {"role": "user", "content": "a"}


def told(**request: Any) -> tuple[str, str]:
    """Message and field of the answer."""
    request.setdefault("url", "/chat")
    request.setdefault("headers", {"content-type": "application/json"})
    answer = CLIENT.post(**request)
    assert answer.status_code == 400
    return answer.json()["message"], answer.json()["param"]


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [fields]}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [5, 6]}, "messages[0]: found 5, expected an object (the first of 2)"),
        ({"messages": "a"}, 'messages: found "a", expected a list of messages'),
        ({"model": "x"}, "messages: found none, expected a list of messages"),
        *(
            (
                message(role=role, content=content),
                f"messages[0].content: found {found}, expected text or a list of parts",
            )
            for role, content, found in (
                ("user", None, "null"),
                ("user", 5, "5"),
                ("assistant", {}, "{}"),
            )
        ),
        (
            message(role="user"),
            "messages[0].content: found none, expected text or a list of parts",
        ),
        (message(content="a"), "messages[0].role: found none, expected a value"),
        (
            message(role="usr", content="a"),
            'messages[0].role: found "usr", expected one of "system", "assistant", "user"',
        ),
        (
            message(role=5, content="a"),
            "messages[0].role: found 5, expected what the API has: 'role'",
        ),
        (
            message(role="user", content=[{"type": "text", "text": 5}]),
            "messages[0].content[0].text: found 5, expected text",
        ),
        (
            message(role="user", content=[{"type": "txt"}]),
            'messages[0].content[0].type: found "txt", expected one of "text", "thinking"',
        ),
        (
            message(role="assistant", content=[{"type": "thinking"}]),
            "messages[0].content[0]: thinking parts require 'thinking'",
        ),
        (
            message(role="user", content=[{"type": "thinking", "thinking": "a"}]),
            "messages[0]: thinking parts are only valid in assistant messages",
        ),
        (
            message(role="assistant", tool_calls=[{}]),
            "messages[0].tool_calls[0].function: found none, expected an object",
        ),
        (
            {"messages": [USER], "tools": [{"function": {}}]},
            "tools[0].function.name: found none, expected a value: this field is required",
        ),
        (
            {"messages": [USER], "tool_choice": "x"},
            'tool_choice: found "x", expected an object or one of "auto", "none"',
        ),
        (
            {"messages": [USER], "response_format": {"type": "json"}},
            'response_format.type: found "json", '
            'expected one of "text", "json_object", "structural_tag"',
        ),
        (
            {"messages": [USER], "response_format": {}},
            "response_format.type: found none, expected a value",
        ),
        (
            {"messages": [USER], "response_format": {"type": "structural_tag"}},
            "response_format.format: found none, expected a value",
        ),
        (
            {"messages": [USER], "reasoning_effort": "x"},
            'reasoning_effort: found "x", expected a number or one of "low", "high"',
        ),
        (
            {"messages": [USER], "reasoning_effort": 2},
            "reasoning_effort: found 2, expected what the API has: less than or equal to 1",
        ),
        ({"messages": [USER], "n": "x"}, 'n: found "x", expected an integer'),
        ({"messages": [USER], "model": "bad"}, "the body: no such model"),
    ],
    ids=str,
)
def test_the_variant_that_was_meant_is_told_and_no_name_of_a_class(
    body: dict[str, Any], text: str
) -> None:
    """It was the first of a union's errors, with the names of pydantic's validators in its path."""
    told_text, field = told(json=body)
    assert told_text.startswith(text)
    assert text.startswith(field + ":")
    assert "function-" not in told_text
    assert "key_order" not in told_text


@pytest.mark.parametrize("url", ["/chat", "/plain"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{hello", "the body: found no JSON at character 2 ("),
        (b'{"model": "x",}', "the body: found no JSON at character 15 ("),
        (b"", "the body: found none, expected a JSON object"),
    ],
)
def test_what_is_no_json_is_told_of_the_body(url: str, content: bytes, text: str) -> None:
    """It was told of a field named "1", where the text broke off."""
    told_text, field = told(url=url, content=content)
    assert told_text.startswith(text)
    assert field == "the body"


@pytest.mark.parametrize("url", ["/chat", "/plain"])
@pytest.mark.parametrize(
    ("header", "found"),
    [
        (
            {"content-type": "application/x-www-form-urlencoded"},
            "application/x-www-form-urlencoded",
        ),
        ({}, "none"),
    ],
)
def test_what_a_body_is_said_to_be_is_told(url: str, header: dict[str, str], found: str) -> None:
    """Of ``curl -d``. The answer said null, and on other routes quoted the body's bytes."""
    told_text, field = told(url=url, content=b'{"messages": []}', headers=header)
    assert told_text.startswith(f"content-type: found {found}, expected application/json (curl: -H")
    assert field == "content-type"
