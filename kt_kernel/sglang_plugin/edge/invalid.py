"""What pydantic says of a request, as one problem: the field's path, its value, what was expected.

Pydantic names each variant of a union in an error's place, and tells the errors of all of them.
Here the variant is looked for that the client meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from kt_kernel.sglang_plugin.edge.kinds import Problem, Said, as_json, shortened

Error = Mapping[str, Any]
"""Of ``ValidationError.errors()``."""
Place = tuple[str | int, ...]

NAMES_ITS_KIND = ("role", "type")
"""Fields by which a client says which variant of a union it means."""

_FIELD = re.compile("[a-z_][a-z0-9_]*")
_SCALARS = frozenset({"str", "int", "float", "bool", "bytes"})
_OF_A_VALIDATOR = ("value_error", "assertion_error")

_KINDS = {
    "string": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
    "dataclass": "an object",
}
"""By the first word of an error's type."""

_LISTS = {
    "messages": "a list of messages",
    "content": "a list of parts",
    "tools": "a list of tools",
}
_REQUIRED = {
    "the body": "a JSON object",
    "messages": _LISTS["messages"],
    "content": f"text or {_LISTS['content']}",
    "prompt": "text or token ids",
    "function": "an object",
}
"""What is expected of a field that is not there; of any other, a value."""


@dataclass(frozen=True)
class Invalid(Problem):
    """Of a value as a whole, which is not quoted: it may be long."""

    def __str__(self) -> str:
        return f"{self.path}: {self.expected}"


def problem_of_errors(errors: Sequence[Error]) -> Problem:
    """The first field's problem. ``errors`` is not empty; their places begin in the body."""
    places = {tuple(takewhile(_is_real, error["loc"])) for error in errors}
    more = f" (the first of {len(places)})" if len(places) > 1 else ""
    chosen = _of_what_was_meant(list(errors), 0)
    place = tuple(filter(_is_real, chosen[0]["loc"]))
    path, value = path_of(place), chosen[0].get("input")
    for error in chosen:
        if error["type"] in _OF_A_VALIDATOR and not _words(error, place):
            if isinstance(value, dict | list):
                return Invalid(path, value, _message(error) + more)
            return Problem(path, value, f"what the API has: {_message(error)}{more}")
    if chosen[0]["type"] == "missing":
        name = str(place[-1]) if place else path
        expected = _REQUIRED.get(name, "a value: this field is required")
        return Problem(path, Said("none"), expected + more)
    return Problem(path, value, _expected(chosen, place) + more)


def _expected(errors: list[Error], place: Place) -> str:
    """What a value's errors say of what it may be; each is of another variant."""
    words = dict.fromkeys(as_json(word) for error in errors for word in _words(error, place))
    phrases = dict.fromkeys(_phrase(error, place) for error in errors if not _words(error, place))
    one_of = "one of " if len(words) > 1 else ""
    return " or ".join([*phrases, *([one_of + ", ".join(words)] if words else [])])


def path_of(place: Place) -> str:
    """A place in the body as ``kinds`` writes it: ``messages[0].content``."""
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{shortened(part)}"
    return path.removeprefix(".") or "the body"


def _is_real(part: str | int) -> bool:
    """Whether it is a field or an index, and no name of a variant.

    Names of variants are those of types and classes: ``list[str]``, ``ToolChoice``.
    """
    return isinstance(part, int) or (bool(_FIELD.fullmatch(part)) and part not in _SCALARS)


def _of_what_was_meant(errors: list[Error], start: int) -> list[Error]:
    """The errors of one place that are worth telling; all places agree up to ``start``."""
    loc: Place = errors[0]["loc"]
    end = start + len(list(takewhile(_is_real, loc[start:])))
    if end == len(loc):
        return errors[:1]
    variants: dict[Place, list[Error]] = {}
    for error in errors:
        if error["loc"][:end] == loc[:end]:
            names = tuple(takewhile(lambda part: not _is_real(part), error["loc"][end:]))
            variants.setdefault(names, []).append(error)

    def at(names: Place, *below: str) -> list[Error]:
        return [one for one in variants[names] if one["loc"] == (*loc[:end], *names, *below)]

    # A validator that sees a variant as a whole does so when its fields fit.
    of_the_kind = [
        names for names in variants if all(error["type"] in _OF_A_VALIDATOR for error in at(names))
    ]
    if not of_the_kind:
        return [error for names in variants for error in at(names)]
    wrongly_named = {
        names: [error for field in NAMES_ITS_KIND for error in at(names, field)]
        for names in of_the_kind
    }
    meant = next((names for names in of_the_kind if not wrongly_named[names]), None)
    unnamed = [one for one in wrongly_named[of_the_kind[0]] if one["type"] == "missing"]
    if unnamed:
        # Another may have a default there; the first is the usual one.
        return unnamed
    if meant is None:
        return [error for names in of_the_kind for error in wrongly_named[names][:1]]
    return _of_what_was_meant(variants[meant], end + len(meant))


def _words(error: Error, place: Place) -> list[str]:
    """The words of which a field takes one, or none if the error is another."""
    message = str(error["msg"])
    if error["type"] != "literal_error" and "must be one of" not in message:
        return []
    return [word for word in re.findall(r"'([^']*)'", message) if word not in place]


def _phrase(error: Error, place: Place) -> str:
    kind = str(error["type"]).partition("_")[0]
    if kind == "list" and place:
        return _LISTS.get(str(place[-1]), _KINDS[kind])
    return _KINDS.get(kind) or f"what the API has: {_message(error)}"


def _message(error: Error) -> str:
    message = " ".join(str(error["msg"]).split())[:300]
    return re.sub("^(Value error, |Assertion failed, |Input should be )", "", message)
