"""The table of fields takes what is in range and names what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.sglang_plugin.edge.check import (
    problem_of_body,
    problem_of_object,
    problem_of_sampling,
)
from kt_kernel.sglang_plugin.edge.fields import FIELDS, MAX_ANSWERS, SAMPLING
from kt_kernel.sglang_plugin.edge.kinds import MAX_DEPTH, Internal, Limits
from tests.sglang_plugin.edge.strategies import BODIES, json_values, right, wrong

LIMITS = Limits(vocabulary=1024, context=3000, hidden=64)

names = st.sampled_from(sorted(FIELDS))


@pytest.mark.parametrize("route", BODIES)
def test_ordinary_requests_pass(route: str) -> None:
    assert problem_of_body(BODIES[route], LIMITS) is None


@given(data=st.data(), name=names)
def test_what_a_kind_takes_passes(data: st.DataObject, name: str) -> None:
    value = data.draw(right(FIELDS[name], LIMITS))
    assert list(FIELDS[name].problems(name, value, LIMITS)) == []


@given(data=st.data(), name=names)
def test_anything_else_is_named(data: st.DataObject, name: str) -> None:
    value = data.draw(wrong(FIELDS[name], LIMITS))
    problem = problem_of_body({"model": "x", name: value}, LIMITS)
    assert problem is not None
    assert problem.path.startswith(name)
    assert str(problem).startswith(f"{problem.path}: found ")
    assert ", expected " in str(problem)


@given(body=json_values | st.dictionaries(names, json_values, max_size=4))
def test_no_body_is_too_strange_to_be_checked(body: Any) -> None:
    str(problem_of_body(body, LIMITS))
    if isinstance(body, dict):
        problem_of_object(body, LIMITS)
        problem_of_sampling(body, LIMITS)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            {"top_logprobs": 1_000_000},
            "top_logprobs: found 1000000, expected an integer from 0 to 1024",
        ),
        (
            {"stop_token_ids": [5, 151_645]},
            "stop_token_ids[1]: found 151645, expected an integer from 0 to 1023",
        ),
        (
            {"sampling_params": [{"n": 1}, {"top_k": 2**40}]},
            "sampling_params[1].top_k: found 1099511627776, "
            "expected -1 or an integer from 1 to 2147483647",
        ),
        ({"prompt": [-3]}, "prompt[0]: found -3, expected an integer from 0 to 1023"),
        ({"prompt": [[1], []]}, "prompt[1]: found [], expected 1 token id or more"),
        ({"n": True}, "n: found true, expected an integer from 1 to 128"),
        (
            {"logit_bias": {"5000": 1}},
            "logit_bias: found the key 5000, expected keys that are token ids from 0 to 1023",
        ),
        ({"top_p": 0}, "top_p: found 0, expected a number above 0 and up to 1"),
        ({"n": 10**5000}, "n: found a number of thousands of digits, expected an integer from"),
        ({"ignore_eos": "y" * 500}, 'ignore_eos: found "' + "y" * 59 + "... (502 characters), "),
        (
            {"text": ["a", "b"], "top_logprobs_num": [1]},
            "top_logprobs_num: found a list of 1, expected 2, one for each prompt",
        ),
        ({"messages": [], "logprobs": 5}, "logprobs: found 5, expected true or false"),
        (
            {"prompt": "a", "logprobs": "yes"},
            'logprobs: found "yes", expected true or false or an integer from 0 to 1024',
        ),
        (
            {"messages": [], "top_logprobs": 3, "logprobs": False},
            "top_logprobs: found 3, expected logprobs to be true beside it",
        ),
        ({"response_format": "json"}, 'response_format: found "json", expected an object'),
        (
            {"response_format": {"type": "json_schema", "schema": "x"}},
            'response_format.schema: found "x", expected an object',
        ),
        ({"text": "a", "rid": ["x"]}, "rid: found a list of 1, expected one, not a list"),
        (
            {"prompt": ["a"] * 100, "n": 100},
            "the request: found 100 prompts with 100 answers each, "
            f"expected at most {MAX_ANSWERS} answers in all",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_text_says_field_value_and_range(body: dict[str, Any], text: str) -> None:
    assert str(problem_of_body(body, LIMITS)).startswith(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"foo": 1, "store": True, "metadata": {"a": "b"}},
        {"model": "gpt-4"},
        {"reasoning_effort": "ultra"},
        {"top_logprobs": 0},
        {"logprobs": True, "top_logprobs": 3},
        {"response_format": {"type": "text"}, "logprobs": False},
    ],
    ids=str,
)
def test_what_clients_of_other_servers_send_passes(fields: dict[str, Any]) -> None:
    assert problem_of_body(BODIES["/v1/chat/completions"] | fields, LIMITS) is None


def test_depth_is_limited_for_the_body_and_for_a_schema_in_it() -> None:
    def nested(depth: int) -> Any:
        return json.loads("[" * depth + "]" * depth)

    assert problem_of_body({"metadata": nested(MAX_DEPTH - 1)}, LIMITS) is None
    deep = nested(MAX_DEPTH)
    assert "inside one another" in str(problem_of_body({"metadata": deep}, LIMITS))
    schema = {"sampling_params": {"json_schema": json.dumps([deep])}}
    assert "sampling_params.json_schema" in str(problem_of_body(schema, LIMITS))


def test_a_tools_schema_may_have_properties_of_any_name() -> None:
    """Only the request's own fields are checked, not the names that a client invents."""
    schema = {"properties": {"n": {"type": "integer"}, "top_k": -5, "max_tokens": "x"}}
    function = {"name": "f", "parameters": schema}
    body = BODIES["/v1/chat/completions"] | {"tools": [{"type": "function", "function": function}]}
    assert problem_of_body(body, LIMITS) is None


def test_a_long_conversation_is_one_prompt() -> None:
    parts = [{"role": "user", "content": "hi"}] * (MAX_ANSWERS + 1)
    assert problem_of_body({"model": "x", "input": parts, "rid": "a"}, LIMITS) is None


def test_what_sglang_set_itself_is_not_looked_at() -> None:
    ours = {"received_time": 5.0, "lora_id": "x", "n": 1}
    assert problem_of_object(ours, LIMITS) is None
    assert problem_of_body(ours, LIMITS) is not None
    assert problem_of_sampling({"is_normalized": True, "stop_token_ids": {5}}, LIMITS) is None


def test_every_internal_name_of_sampling_is_internal_for_clients() -> None:
    """One of them skips SGLang's own checks of all the others."""
    assert isinstance(SAMPLING["is_normalized"], Internal)
