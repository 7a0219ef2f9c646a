"""The checks behind the HTTP server: of SGLang's objects, and in the scheduler."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kt_kernel.sglang_plugin.edge import scheduler, tokenizer
from kt_kernel.sglang_plugin.edge.kinds import UNLIMITED, Limits


def manager(**fields: Any) -> SimpleNamespace:
    """SGLang's ``TokenizerManager``, as far as it is looked at."""
    config = SimpleNamespace(vocab_size=1024, hidden_size=64, context_len=163840)
    words = SimpleNamespace(model_max_length=131072)
    return SimpleNamespace(
        **{"model_config": config, "context_len": 163840, "tokenizer": words} | fields
    )


def test_the_context_that_is_told_is_the_one_that_is_served() -> None:
    """Three places tell it, and SGLang compares with two of them."""
    it = manager()
    tokenizer.tell_served_context(it, {"max_req_input_len": 9994})
    told = (it.context_len, it.model_config.context_len, it.tokenizer.model_max_length)
    assert told == (9994, 9994, 9994)
    assert tokenizer.limits_of(it) == Limits(1024, 9994, 64)


def test_a_tokenizer_that_takes_less_keeps_its_number() -> None:
    it = manager(tokenizer=SimpleNamespace(model_max_length=512))
    tokenizer.tell_served_context(it, {"max_req_input_len": 9994})
    assert it.tokenizer.model_max_length == 512


def test_a_server_that_shortens_has_no_limit_of_tokens() -> None:
    assert tokenizer.limits_of(manager(allow_auto_truncate=True)).context == UNLIMITED.context


def test_the_router_of_several_processes_serves_nothing_itself() -> None:
    tokenizer.serve_within_limits(SimpleNamespace(tokenizer_manager=SimpleNamespace()))
    assert tokenizer.current_limits() == UNLIMITED


def test_a_request_of_a_route_that_was_forgotten_is_checked() -> None:
    calls: list[object] = []
    request = SimpleNamespace(top_logprobs_num=1 << 32, received_time=5.0)
    with pytest.raises(ValueError, match="top_logprobs_num: found 4294967296, expected an integer"):
        tokenizer.normalize_checked(calls.append, request)
    assert calls == []
    request.top_logprobs_num = 5
    tokenizer.normalize_checked(calls.append, request)
    assert calls == [request]


def raising(error: Exception) -> Any:
    def function(*args: Any) -> None:
        raise error

    return function


def test_an_exception_that_a_requests_shape_caused_is_answered_with_400() -> None:
    with pytest.raises(ValueError, match="cannot be served: TypeError: no such field"):
        tokenizer.normalize_checked(raising(TypeError("no such field")), SimpleNamespace())
    with pytest.raises(ValueError, match=r"^in SGLang's words$"):
        tokenizer.normalize_checked(raising(ValueError("in SGLang's words")), SimpleNamespace())


@pytest.mark.parametrize(
    ("ids", "sampling", "text"),
    [
        ([5, 1024], {}, r"the prompt\[1\]: found 1024"),
        ([], {}, r"the prompt: found \[\]"),
        ([5], {"stop_token_ids": {3, -1}}, r"stop_token_ids\[\d\]: found -1"),
        ([5], {"top_k": 2**40}, "top_k: found"),
        ([5], {"repetition_penalty": 1e-300}, "repetition_penalty: found"),
    ],
)
def test_what_goes_to_the_scheduler_is_checked(
    ids: list[int], sampling: dict[str, Any], text: str
) -> None:
    def create(*args: Any) -> Any:
        return SimpleNamespace(
            sampling_params=SimpleNamespace(**{"stop_token_ids": None} | sampling)
        )

    request = SimpleNamespace(session_params=None)
    with pytest.raises(ValueError, match=text):
        tokenizer.tokenized_checked(create, manager(), request, "a", ids)


@pytest.mark.parametrize(
    ("top", "start", "answer", "is_served"),
    [
        (20, -1, None, True),
        (20, 0, 100_000, True),
        (1024, -1, 4000, True),
        (1024, 0, 4000, False),
        (1024, -1, None, False),
    ],
)
def test_logprobs_have_a_limit_of_memory(
    top: int, start: int, answer: int | None, is_served: bool
) -> None:
    """They are kept until the answer ends: the vocabulary for a whole context is terabytes."""
    made = SimpleNamespace(
        sampling_params=SimpleNamespace(stop_token_ids=None, max_new_tokens=answer),
        return_logprob=True,
        logprob_start_len=start,
        top_logprobs_num=top,
        token_ids_logprob=None,
        input_ids=[5] * 200,
    )
    if is_served:
        assert tokenizer.tokenized_checked(lambda *_: made, manager(), made, None, [5]) is made
    else:
        with pytest.raises(ValueError, match="logprobs: found 1024 for each of"):
            tokenizer.tokenized_checked(lambda *_: made, manager(), made, None, [5])


@pytest.mark.parametrize(("mode", "closed"), [(None, 3), ("stat", 0)])
def test_records_of_experts_are_asked_for_where_there_are_some(
    mode: str | None, closed: int
) -> None:
    """SGLang's scheduler raises at GET /start_expert_distribution_record without a recorder."""
    arguments = SimpleNamespace(expert_distribution_recorder_mode=mode)
    assert len(tokenizer.closed_routes(arguments)) == closed


def test_a_session_may_go_on_without_a_new_token() -> None:
    request = SimpleNamespace(session_params={"id": "x"})
    made = SimpleNamespace(sampling_params=SimpleNamespace(stop_token_ids={3}))
    assert tokenizer.tokenized_checked(lambda *_: made, manager(), request, None, []) is made


class Request:
    def __init__(self, rid: str, batch: list[Request] | None = None) -> None:
        self.rid = rid
        self.batch = batch or []


class Prompt(Request): ...


class Batch(Request): ...


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A scheduler that queues each prompt, and raises for one whose id says so."""
    module: Any = ModuleType("sglang.srt.managers.io_struct")
    module.TokenizedGenerateReqInput = Prompt
    module.BatchTokenizedGenerateReqInput = Batch
    module.TokenizedEmbeddingReqInput = type("TokenizedEmbeddingReqInput", (), {})
    module.BatchTokenizedEmbeddingReqInput = type("BatchTokenizedEmbeddingReqInput", (), {})
    module.AbortReq = SimpleNamespace
    monkeypatch.setitem(sys.modules, module.__name__, module)
    answers: list[tuple[Any, Any]] = []
    sender = SimpleNamespace(send_output=lambda answer, request: answers.append((answer, request)))
    channels = SimpleNamespace(send_to_tokenizer=sender)
    return SimpleNamespace(waiting_queue=[], ipc_channels=channels, answers=answers, rounds=0)


def process(queue: Any, requests: list[Request]) -> None:
    for request in requests:
        for one in request.batch or [request]:
            if "bad" in one.rid:
                raise RuntimeError(f"no {one.rid}")
            queue.waiting_queue.append(one)
    queue.rounds += not requests


def test_a_request_that_raises_ends_alone(queue: Any) -> None:
    first, bad, last = Prompt("1"), Prompt("bad"), Prompt("2")
    scheduler.process_each_request(process, queue, [first, bad, last])
    assert queue.waiting_queue == [first, last]
    ((answer, request),) = queue.answers
    assert (answer.rid, request) == ("bad", bad)
    assert answer.finished_reason["status_code"] == 400
    assert "RuntimeError: no bad" in answer.finished_reason["message"]
    assert queue.rounds == 1


def test_a_batch_ends_whole(queue: Any) -> None:
    """Its client waits for all of it: what is queued already would be computed for nobody."""
    batch = Batch("", [Prompt("1"), Prompt("bad"), Prompt("2")])
    scheduler.process_each_request(process, queue, [Prompt("0"), batch])
    assert [one.rid for one in queue.waiting_queue] == ["0"]
    assert [answer.rid for answer, _ in queue.answers] == ["1", "bad", "2"]


def test_what_nobody_would_answer_still_ends_the_server(queue: Any) -> None:
    with pytest.raises(RuntimeError, match="no bad update"):
        scheduler.process_each_request(process, queue, [Request("bad update")])


def test_a_round_without_requests_is_one(queue: Any) -> None:
    scheduler.process_each_request(process, queue, [])
    assert queue.rounds == 1
