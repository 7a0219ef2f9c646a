"""Apply the table of fields to one request."""

from collections.abc import Mapping

from kt_kernel.files.foreign import is_deeper
from kt_kernel.sglang_plugin.edge.fields import CHAT_FIELDS, FIELDS, MAX_ANSWERS, SAMPLING
from kt_kernel.sglang_plugin.edge.kinds import (
    MAX_DEPTH,
    Internal,
    Kind,
    Limits,
    Problem,
    Said,
)

PROMPTS = ("prompt", "text", "input_ids", "input", "items", "documents")
"""Fields of which a list may hold several prompts."""

ONE_FOR_EACH = (
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "return_hidden_states",
    "custom_logit_processor",
    "rid",
    "lora_path",
    "extra_key",
    "cache_salt",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "decode_tp_size",
)
"""Fields of which a list has a value for each prompt."""

TOO_DEEP = Problem(
    "the body", Said("more"), f"at most {MAX_DEPTH} lists and objects inside one another"
)


def problem_of_body(body: object, limits: Limits) -> Problem | None:
    """What is wrong first with a request's JSON, or None."""
    if is_deeper(body, MAX_DEPTH):
        return TOO_DEEP
    if not isinstance(body, dict):
        return Problem("the body", body, "a JSON object")
    chat = "messages" in body
    problem = _first(body, CHAT_FIELDS if chat else FIELDS, limits) or _wrong_number(body)
    if problem is None and chat and body.get("top_logprobs") and not body.get("logprobs"):
        # SGLang, unlike OpenAI, leaves them out without a word.
        expected = "logprobs to be true beside it"
        return Problem("top_logprobs", body["top_logprobs"], expected)
    return problem


def problem_of_object(fields: Mapping[str, object], limits: Limits) -> Problem | None:
    """What is wrong first with a request that SGLang has made an object of.

    SGLang has set its own fields then, which are not looked at.
    """
    return _first(fields, PUBLIC, limits) or _wrong_number(fields)


def problem_of_sampling(fields: Mapping[str, object], limits: Limits) -> Problem | None:
    """What is wrong first with ``SamplingParams``, as they go to the scheduler."""
    return _first(fields, SAMPLING_PUBLIC, limits)


def _public(fields: Mapping[str, Kind]) -> dict[str, Kind]:
    return {name: kind for name, kind in fields.items() if not isinstance(kind, Internal)}


#: SGLang names requests itself, too: those without a name, and its health check's.
PUBLIC = {name: kind for name, kind in _public(FIELDS).items() if name != "rid"}
#: SGLang has made a set of the list.
SAMPLING_PUBLIC = {
    name: kind for name, kind in _public(SAMPLING).items() if name != "stop_token_ids"
}


def _first(
    fields: Mapping[str, object], kinds: Mapping[str, Kind], limits: Limits
) -> Problem | None:
    for name, value in fields.items():
        # null is a field's default, on every route.
        if value is not None and (kind := kinds.get(name)) is not None:
            for problem in kind.problems(name, value, limits):
                return problem
    return None


def _wrong_number(fields: Mapping[str, object]) -> Problem | None:
    """More answers than a server has memory for, or lists of another length than the prompts'."""
    prompts = _number_of_prompts(fields)
    nested = fields.get("token_ids_logprob")
    lists = {name: fields.get(name) for name in ONE_FOR_EACH}
    if isinstance(nested, list) and any(isinstance(item, list) for item in nested):
        lists["token_ids_logprob"] = nested
    for name, value in lists.items():
        if isinstance(value, list) and prompts is not None and len(value) != prompts:
            expected = f"{prompts}, one for each prompt" if prompts else "one, not a list"
            return Problem(name, Said(f"a list of {len(value)}"), expected)
    choices = max([1, *(_choices(place) for place in _places_of_n(fields))])
    if (prompts or 1) * choices <= MAX_ANSWERS:
        return None
    found = Said(f"{prompts or 1} prompts with {choices} answers each")
    return Problem("the request", found, f"at most {MAX_ANSWERS} answers in all")


def _number_of_prompts(fields: Mapping[str, object]) -> int | None:
    """How many prompts a list of them has; 0 if there is one that is no list, None if none."""
    given = [name for name in PROMPTS if fields.get(name) is not None]
    if not given:
        return 0 if "messages" in fields else None
    value = fields[given[0]]
    if not isinstance(value, list) or not value or isinstance(value[0], int):
        return 0
    # The parts of one conversation, in /v1/responses.
    return 0 if given[0] == "input" and isinstance(value[0], dict) else len(value)


def _places_of_n(fields: Mapping[str, object]) -> list[object]:
    sampling = fields.get("sampling_params")
    return [fields, *(sampling if isinstance(sampling, list) else [sampling])]


def _choices(fields: object) -> int:
    found = [fields.get(name) for name in ("n", "best_of")] if isinstance(fields, dict) else []
    return max([1, *(number for number in found if isinstance(number, int))])
