"""What a running server is asked to find out whether a request can end it."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings

from kt_kernel.sglang_plugin.edge.check import problem_of_body
from kt_kernel.sglang_plugin.edge.kinds import Limits
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


def check_survives(client: httpx.Client, limits: Limits) -> None:
    """Requests that ended a server, and generated ones: each is answered, and so is the last."""
    opened = client.post("/open_session", json={"capacity_of_str_len": 1000, "session_id": "s"})
    assert opened.status_code == 200
    session = GENERATE | {"session_params": {"id": "s"}}
    assert client.post("/generate", json=session).status_code == 200
    for path, body in DEADLY:
        answer = client.post(path, json=body)
        assert answer.status_code == 400, (path, body, answer.text)

    for action in ("start", "stop", "dump"):
        assert client.get(f"/{action}_expert_distribution_record").status_code == 400

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(request=requests(limits))
    def check(request: tuple[str, Any]) -> None:
        path, body = request
        # As it is sent: with numbers that a careful client would not write.
        answer = client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"}
        )
        problem = problem_of_body(body, limits)
        if problem is None:
            assert answer.status_code < 500, answer.text
        else:
            assert answer.status_code == 400
            assert str(problem) in told(answer.json())

    check()
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert answer.json()["choices"][0]["message"]["content"]


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
