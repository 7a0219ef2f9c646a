"""What a running server is asked to find out whether a request can end it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings

from kt_kernel.sglang_plugin.edge.http import problem_of_bytes
from kt_kernel.sglang_plugin.edge.kinds import Limits
from kt_kernel.sglang_plugin.edge.routes import ROUTES, Role
from tests.sglang_plugin.edge.strategies import BODIES, CHAT, requests

EXAMPLES = 150

GENERATE = BODIES["/generate"]

#: Each ended the server, the first four with its exit status 137.
DEADLY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1_000_000}),
    ("/v1/chat/completions", CHAT | {"min_tokens": 2, "stop_token_ids": [151_645]}),
    ("/v1/chat/completions", CHAT | {"temperature": 1, "top_k": 2**40}),
    ("/v1/completions", {"model": "x", "prompt": [-3], "max_tokens": 1}),
    ("/generate", {"input_ids": [[]]}),
    ("/generate", {"text": ""}),
    ("/generate", GENERATE | {"custom_labels": {"a": "b"}}),
    ("/generate", GENERATE | {"positional_embed_overrides": {"a": 1}}),
    ("/generate", {"text": "a", "sampling_params": {"is_normalized": True}}),
    # Grammars that allow no token, at once and later.
    ("/generate", {"text": "a", "sampling_params": {"json_schema": '{"$ref": "#"}'}}),
    ("/generate", {"text": "a", "sampling_params": {"ebnf": 'root ::= "a" b\nb ::= b'}}),
    # This would take for ever.
    (
        "/generate",
        {
            "text": "a",
            "sampling_params": {"stop_regex": r"(?:.|.|\s)*\d{9}$", "ignore_eos": True},
        },
    ),
    # To replace a request of a session: SGLang changes a dictionary while it reads it. Nothing of
    # the request is wrong; the scheduler has to survive it.
    ("/generate", GENERATE | {"session_params": {"id": "s", "replace": True}}),
]

ROLE = {"role": "function", "content": "a"}
RESULT = {"role": "user", "content": [{"type": "tool_result", "content": "a"}]}

#: Nothing of it is in the table of fields; SGLang answered each with 500, or not at all, or with
#: what only its authors can read. Of some, how the answer begins.
MISTAKES: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", {"messages": [ROLE]}, ""),
    ("/v1/messages", {"max_tokens": 1, "messages": [RESULT]}, ""),
    ("/v1/messages/count_tokens", {"messages": [RESULT]}, ""),
    ("/v1/responses", {"input": []}, ""),
    ("/parse_function_call", {"text": "a", "tools": [], "tool_call_parser": "none such"}, ""),
    ("/separate_reasoning", {"text": "a", "reasoning_parser": "none such"}, ""),
    ("/invocations", {"messages": [ROLE]}, ""),
    ("/invocations", {"messages": "a"}, ""),
    ("/tokenize", {"messages": [ROLE]}, ""),
    ("/api/chat", {"messages": [{"role": "user", "content": "a"}]}, ""),
    ("/v1/chat/completions", {}, "messages: found none, expected a list of messages"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content: found null, expected text or a list of parts",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages[0].content[0].text: found 5, expected text",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "usr", "content": "a"}]},
        'messages[0].role: found "usr", expected one of "system", "assistant", "tool", ',
    ),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": 5}]},
        "messages[0].content: found 5, expected text or a list of parts",
    ),
    (
        "/v1/messages",
        {"max_tokens": 1, "messages": [{"role": "user", "content": None}]},
        "messages[0].content: found null, expected text or a list of parts",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name: found none, expected a value",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
        "Tool 0 function has invalid 'parameters' schema: 'x' is not of type",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"response_format": {}},
        "response_format.type: found none, expected a value",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_schema"}},
        "response_format.json_schema.schema: found none, expected a JSON schema",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages: found a tool's result without its call",
    ),
]


def check_mistakes(client: httpx.Client) -> None:
    """A client's mistake is one message and no fault of the server: a router counts those."""

    def check(path: str, start: str, **request: Any) -> None:
        answer = client.post(path, **request)
        message = told(answer.json())
        good = answer.status_code == 400 and "\n" not in message and ".py" not in message
        assert good, (path, request, answer.text)
        assert message.startswith(start), (path, request, answer.text)

    (card,) = client.get("/v1/models").json()["data"]
    for path, body, start in MISTAKES:
        check(path, start, json=body | {"model": card["id"]})
    for path in ("/v1/chat/completions", "/generate", "/invocations"):
        json_type = {"content-type": "application/json"}
        no_json = "the body: found no JSON at character 2 ("
        check(path, no_json, content=b"{hello", headers=json_type)
        check(path, "content-type: found application/x-www-form-urlencoded", data={"a": "b"})


def check_survives(client: httpx.Client, limits: Limits) -> None:
    """Requests that ended a server, and generated ones: each is answered, and so is the last.

    ``client`` sends the administrator's key.
    """
    opened = client.post("/open_session", json={"capacity_of_str_len": 1000, "session_id": "s"})
    assert opened.status_code == 200
    session = GENERATE | {"session_params": {"id": "s"}}
    assert client.post("/generate", json=session).status_code == 200
    for path, body in DEADLY:
        answer = client.post(path, json=body)
        assert answer.status_code == 400, (path, body, answer.text)

    for action in ("start", "stop", "dump"):
        assert client.post(f"/{action}_expert_distribution_record").status_code == 400

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(request=requests(limits))
    def check(request: tuple[str, Any]) -> None:
        path, body = request
        # As it is sent: with numbers that a careful client would not write.
        content = json.dumps(body)
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        problem = problem_of_bytes(content.encode(), limits)
        if problem is None:
            assert answer.status_code < 500, answer.text
        else:
            assert answer.status_code == 400
            assert str(problem) in told(answer.json())

    check()
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert answer.json()["choices"][0]["message"]["content"]


def check_access(base: str, user_key: str, admin_key: str, secret_free: Sequence[Path]) -> None:
    """Each route of the table answers whom it is for, and is closed to others; and keys are told
    nowhere: not in what the server says of itself, and not in these files."""

    def ask(method: str, path: str, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        path = path.replace("{...}", "x").replace("{}", "x")
        return httpx.request(method, base + path, headers=headers, timeout=60, trust_env=False)

    for path, roles in ROUTES.items():
        for method, role in roles.items():
            told = {key: ask(method, path, key).status_code for key in (None, "wrong", user_key)}
            if role is Role.ANYONE:
                assert set(told.values()) == {200}, (method, path, told)
                continue
            assert told[None] == told["wrong"] == 401, (method, path, told)
            assert (told[user_key] == 403) == (role is Role.ADMIN), (method, path, told)
    assert ask("GET", "/flush_cache", admin_key).status_code == 405
    assert ask("POST", "/update_weights_from_tensor", admin_key).status_code == 404
    assert ask("GET", "/docs", user_key).status_code == 404
    for value in (b"Bearer \xff\xfe", "Bearer \u00fc".encode(), b"\xe9"):
        raw = [(b"Authorization", value)]
        answer = httpx.get(f"{base}/v1/models", headers=raw, timeout=60, trust_env=False)
        assert answer.status_code == 401
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    asked = httpx.options(f"{base}/generate", headers=origin, timeout=60, trust_env=False)
    told_to = httpx.get(f"{base}/health", headers=origin, timeout=60, trust_env=False)
    for answer in (asked, told_to):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    info = ask("GET", "/server_info", admin_key)
    assert info.json()["tp_size"] == 1
    for text in (info.text, *(file.read_text(errors="replace") for file in secret_free)):
        assert user_key not in text
        assert admin_key not in text


def check_context(client: httpx.Client, total: int) -> int:
    """What the server says that it takes, it takes, and not one token more.

    ``total`` is its KT_MAX_TOTAL_TOKENS. Returns what the server says.
    """
    (card,) = client.get("/v1/models").json()["data"]
    context = card["max_model_len"]
    # SGLang keeps some tokens of its memory to itself.
    assert total - 16 < context <= total
    assert client.get(f"/v1/models/{card['id']}").json()["max_model_len"] == context
    words = {"model": "x", "prompt": "a"}
    assert client.post("/tokenize", json=words).json()["max_model_len"] == context

    def ask(prompt: int, answer: int) -> httpx.Response:
        body = {"prompt": [5] * prompt, "max_tokens": answer, "ignore_eos": True, "model": "x"}
        return client.post("/v1/completions", json=body)

    full = ask(context - 4, 4)
    assert full.json()["usage"]["completion_tokens"] == 4
    for prompt, tokens in ((context - 3, 4), (context, 1), (context + 5, 1), (5, context + 1)):
        answer = ask(prompt, tokens)
        assert answer.status_code == 400
        assert str(context) in answer.json()["message"]
    return int(context)


def told(answer: Any) -> str:
    """The message of an error, in whichever shape."""
    return str(answer.get("error", answer)["message"])
