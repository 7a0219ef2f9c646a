"""The kinds of values that a request's field may have."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from kt_kernel.files.foreign import is_deeper

MAX_DEPTH = 100
"""Lists and objects inside one another. xgrammar takes gigabytes for a JSON schema of thousands."""

MAX_CHARACTERS = 1 << 18
"""Of a grammar or a JSON schema."""


@dataclass(frozen=True)
class Limits:
    """What depends on the model and on the server.

    vocabulary: token ids are 0 to vocabulary - 1.
    context: tokens of a prompt and its answer together.
    hidden: numbers of a token's embedding; None if that is not known.
    """

    vocabulary: int
    context: int
    hidden: int | None = None


UNLIMITED = Limits(1 << 31, 1 << 31)
"""Before a server knows its own."""

Bound = int | float | Callable[[Limits], int]
"""Of a range: a number, or what it is on this server."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a request: where, the value there, what was expected."""

    path: str
    value: object
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: found {shortened(as_json(self.value))}, expected {self.expected}"


class Said(str):
    """What was found, in words: told without quotes."""


class Kind(Protocol):
    """What a field's value may be."""

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        """Yield what is wrong with ``value``, found at ``path``; never called with None."""


def resolve(bound: Bound, limits: Limits) -> int | float:
    return bound(limits) if callable(bound) else bound


def last_token(limits: Limits) -> int:
    return limits.vocabulary - 1


def context(limits: Limits) -> int:
    return limits.context


@dataclass(frozen=True)
class Integer:
    """An integer from ``low`` to ``high``, both included, or the one that stands ``aside``."""

    low: Bound
    high: Bound
    aside: int | None = None

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        low, high = resolve(self.low, limits), resolve(self.high, limits)
        # A bool is an int to Python: true would be served as 1.
        if type(value) is not int or not (low <= value <= high or value == self.aside):
            besides = "" if self.aside is None else f"{self.aside} or "
            yield Problem(path, value, f"{besides}an integer from {low} to {high}")


@dataclass(frozen=True)
class Number:
    """A number from ``low`` to ``high``, both included; ``above`` excludes ``low``."""

    low: float
    high: float
    above: bool = False

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        fits = type(value) in (int, float) and (
            self.low <= value <= self.high  # type: ignore[operator]  # false for NaN
            and not (self.above and value == self.low)
        )
        if not fits:
            start = f"above {self.low:g} and up" if self.above else f"from {self.low:g}"
            yield Problem(path, value, f"a number {start} to {self.high:g}")


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if type(value) is not bool:
            yield Problem(path, value, "true or false")


@dataclass(frozen=True)
class Text:
    """A string of ``least`` to ``characters`` characters."""

    characters: int = 4096
    least: int = 0

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, str) or not self.least <= len(value) <= self.characters:
            size = (
                f"{self.least} to {self.characters}" if self.least else f"at most {self.characters}"
            )
            yield Problem(path, value, f"a string of {size} characters")


@dataclass(frozen=True)
class RequestId:
    """A client's name for its request, which is none of SGLang's own."""

    reserved: str = "HEALTH_CHECK"

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        problem = next(Text(256, least=1).problems(path, value, limits), None)
        if problem is not None:
            yield problem
        elif isinstance(value, str) and value.startswith(self.reserved):
            # Such a request is not answered while there are others.
            yield Problem(path, value, f"a string that does not begin with {self.reserved}")


@dataclass(frozen=True)
class Pattern:
    """A regular expression of Python's, of at most so many bytes."""

    size: int = 256

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, str) or len(value.encode(errors="replace")) > self.size:
            yield Problem(path, value, f"a regular expression of at most {self.size} bytes")
            return
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            yield Problem(path, value, f"a regular expression of Python's: {error}")


@dataclass(frozen=True)
class JsonText:
    """A JSON document as a string, nested no deeper than a request may be."""

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
            yield Problem(path, value, f"a string of at most {MAX_CHARACTERS} characters")
            return
        try:
            deep = value.strip() != "" and is_deeper(json.loads(value), MAX_DEPTH)
        except RecursionError:
            deep = True
        except ValueError:
            yield Problem(path, value, "a JSON document")
            return
        if deep:
            yield Problem(path, value, f"JSON of at most {MAX_DEPTH} lists and objects in another")


@dataclass(frozen=True)
class TokenIds:
    """A list of token ids of the vocabulary: ``least`` or more, and at most ``most``."""

    most: int | None = None
    least: int = 0

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, list):
            yield Problem(path, value, "a list of token ids")
            return
        if self.most is not None and len(value) > self.most:
            yield Problem(path, Said(f"{len(value)} token ids"), f"at most {self.most}")
            return
        if len(value) < self.least:
            yield Problem(path, value, f"{self.least} token id or more")
            return
        if set(map(type, value)) <= {int} and (
            not value or (min(value) >= 0 and max(value) < limits.vocabulary)
        ):
            return
        one = Integer(0, last_token)
        for index, token in enumerate(value):
            yield from one.problems(f"{path}[{index}]", token, limits)


@dataclass(frozen=True)
class OneOrList:
    """A value of the kind, or a list of them, one for each prompt; null may be among them."""

    kind: Kind

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, list):
            yield from self.kind.problems(path, value, limits)
            return
        for index, item in enumerate(value):
            if item is not None:
                yield from self.kind.problems(f"{path}[{index}]", item, limits)


@dataclass(frozen=True)
class IdsOrLists:
    """A list of token ids, or a list of such lists, each of ``least`` or more; null may be among
    them."""

    ids: TokenIds = TokenIds()
    least: int = 0

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            yield from OneOrList(replace(self.ids, least=self.least)).problems(path, value, limits)
        else:
            yield from self.ids.problems(path, value, limits)


@dataclass(frozen=True)
class Embeddings:
    """Rows of numbers, one for each token of a prompt, or a list of such prompts."""

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        rows = value if isinstance(value, list) else [value]
        if all(isinstance(row, list) and any(isinstance(n, list) for n in row) for row in rows):
            for index, prompt in enumerate(rows):
                yield from self.problems(f"{path}[{index}]", prompt, limits)
            return
        for index, row in enumerate(rows):
            fits = isinstance(row, list) and len(row) == (limits.hidden or len(row))
            if not fits or not all(type(n) in (int, float) and abs(n) < 1e30 for n in row):
                size = "one size" if limits.hidden is None else f"{limits.hidden} numbers"
                yield Problem(f"{path}[{index}]", row, f"a list of {size} below 1e30")


@dataclass(frozen=True)
class Prompt:
    """Text, token ids, or a list of either; what else it may be is the route's to say."""

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, list):
            if isinstance(value, int | float):
                yield Problem(path, value, "text or token ids")
        elif any(isinstance(item, int | float) or _has_no_text(item) for item in value):
            # SGLang's scheduler ends at a prompt of no tokens.
            yield from IdsOrLists(least=1).problems(path, value, limits)


def _has_no_text(item: object) -> bool:
    # A pair of texts is a prompt of models that compare two.
    return isinstance(item, list) and not any(isinstance(part, str | dict) for part in item)


@dataclass(frozen=True)
class ByToken:
    """An object whose keys are token ids."""

    kind: Kind

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if not isinstance(value, dict):
            yield Problem(path, value, "an object from token ids to numbers")
            return
        for key, item in value.items():
            # int() also takes spaces, signs, underscores and digits of other scripts.
            decimal = str(key)
            if not (decimal.isascii() and decimal.isdigit() and len(decimal) < 12) or not (
                int(decimal) < limits.vocabulary
            ):
                expected = f"keys that are token ids from 0 to {limits.vocabulary - 1}"
                yield Problem(path, Said(f"the key {shortened(decimal)}"), expected)
            yield from self.kind.problems(f"{path}.{shortened(decimal)}", item, limits)


@dataclass(frozen=True)
class Fields:
    """An object, or a list of objects, with these fields and others that are not checked."""

    fields: "dict[str, Kind]"

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if isinstance(value, list):
            for index, item in enumerate(value):
                if not isinstance(item, list):
                    yield from self.problems(f"{path}[{index}]", item, limits)
        elif isinstance(value, dict):
            for name, kind in self.fields.items():
                if value.get(name) is not None:
                    yield from kind.problems(f"{path}.{name}", value[name], limits)


@dataclass(frozen=True)
class Object:
    """One object, with these fields and others that are not checked."""

    fields: "dict[str, Kind]"

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if isinstance(value, dict):
            yield from Fields(self.fields).problems(path, value, limits)
        else:
            yield Problem(path, value, "an object")


@dataclass(frozen=True)
class Internal:
    """A field by which SGLang's processes tell one another something: not a client's to set."""

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        if value not in ([], {}, "", 0, False):
            yield Problem(path, value, "nothing: SGLang sets it itself")


@dataclass(frozen=True)
class Either:
    """What one of several kinds takes."""

    kinds: tuple[Kind, ...]

    def problems(self, path: str, value: object, limits: Limits) -> Iterator[Problem]:
        expected: list[str] = []
        for kind in self.kinds:
            problem = next(kind.problems(path, value, limits), None)
            if problem is None:
                return
            expected.append(problem.expected)
        yield Problem(path, value, " or ".join(expected))


def as_json(value: object) -> str:
    """The value as a client wrote it, or as Python does if JSON has no such thing."""
    if isinstance(value, Said):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except ValueError:  # too many digits
        return "a number of thousands of digits"


def shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
