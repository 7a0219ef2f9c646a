"""The markup of DeepSeek V3.2's tool calls, read piece by piece.

What the model's template renders, and this reads back::

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="edit">
    <｜DSML｜parameter name="old" string="true">text as it is</｜DSML｜parameter>
    <｜DSML｜parameter name="count" string="false">2</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

A value ends at its own end tag and at nothing else, so it may contain whitespace at its ends and
the look of any other tag. The body of an invoke may be one JSON object instead of parameters. An
answer may end without the section's end tag, or have no section around its calls. What arrives is
only decided upon when nothing that may follow could change it: a text has one reading, however it
is cut.
"""

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
"""A string of JSON."""

GAP = "\n\n"
"""What the template puts between an answer's text and its calls."""


@dataclass(frozen=True)
class Tags:
    """The names in the markup; V3.2's are the defaults."""

    mark: str = "｜DSML｜"
    invoke: str = "invoke"
    parameter: str = "parameter"

    @property
    def start(self) -> str:
        """The beginning of any start tag, where an answer's text ends."""
        return f"<{self.mark}"


@dataclass(frozen=True)
class Call:
    """A complete call: the function's name, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass
class _Invoke:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    is_sound: bool = True


class Reader:
    """Reads an answer that arrives in pieces.

    Text before the first tag is the answer's; after it only calls count. A call is told when it is
    complete. One whose markup is broken is left out, the ones after it are read.
    """

    def __init__(self, tags: Tags = Tags()) -> None:
        self._tags = tags
        self._text = ""  # what is not yet decided
        self._found = 0  # how far self._text was searched for the end of a value
        self._state: Callable[[], bool] = self._in_text
        self._invoke = _Invoke("")
        self._key = ("", False)  # a parameter's name, and whether its value is a string
        self._prose: list[str] = []
        self._calls: list[Call] = []
        name = r'\s+name="(.*?)"'
        self._invoke_header = re.compile(rf"{name}\s*(/?)>", re.DOTALL)
        self._parameter_header = re.compile(rf'{name}\s+string="([^"]*)"\s*>', re.DOTALL)

    @property
    def held(self) -> str:
        """The end of the answer's text, if it may yet turn out to be markup; text otherwise."""
        return self._text if self._state == self._in_text else ""

    def feed(self, piece: str) -> tuple[str, list[Call]]:
        """The answer's text and the calls that ``piece`` completes."""
        self._text += piece
        while self._state():
            pass
        prose, calls = "".join(self._prose), self._calls
        self._prose, self._calls = [], []
        return prose, calls

    # Each state takes what it can decide from the beginning of self._text. It returns whether to go
    # on, and False when it needs more text.

    def _in_text(self) -> bool:
        before, start, _ = self._text.partition(self._tags.start)
        if start:
            self._prose.append(before.removesuffix(GAP))
            self._take(len(before))
            self._state = self._in_section
            return True
        decided = self._text[: len(self._text) - self._partial(self._tags.start)]
        # Newlines at the end may be the gap.
        decided = decided.removesuffix(GAP) if decided.endswith(GAP) else decided.removesuffix("\n")
        self._prose.append(decided)
        self._take(len(decided))
        return False

    def _in_section(self) -> bool:
        tag = f"{self._tags.start}{self._tags.invoke}"
        start = self._text.find(tag)
        if start < 0:
            self._take(len(self._text) - self._partial(tag))
            return False
        self._take(start)
        header, is_known = self._header(self._invoke_header, len(tag))
        if header is None:
            self._take(len(tag) if is_known else 0)
            return is_known
        self._take(header.end())
        self._invoke = _Invoke(header[1].strip())
        self._state = self._at_body
        if header[2]:
            self._end_invoke()
        return True

    def _at_body(self) -> bool:
        self._text = self._text.lstrip()
        if not self._text:
            return False
        self._state = self._in_json if self._text[0] == "{" else self._in_parameters
        return True

    def _in_json(self) -> bool:
        end_tag = f"</{self._tags.mark}{self._tags.invoke}>"
        end = self._text.find(end_tag, self._found)
        if end < 0:
            self._found = max(self._found, len(self._text) - len(end_tag) + 1)
            return False
        try:
            value = from_json(self._text[:end])
        except ValueError:
            if '"' in STRING.sub("", self._text[:end]):  # a string has this look
                self._found = end + 1
                return True
            value = None
        if isinstance(value, dict):
            self._invoke.arguments = value
        else:
            self._invoke.is_sound = False
        self._take(end + len(end_tag))
        self._end_invoke()
        return True

    def _in_parameters(self) -> bool:
        mark, invoke = self._tags.mark, self._tags.invoke
        tag = f"<{mark}{self._tags.parameter}"
        end_tag = f"</{mark}{invoke}>"
        found = self._text.find(mark)
        if found < 0:
            # Prose between parameters does no harm, but in their place it does.
            kept = max(self._partial(f"<{mark}"), self._partial(f"</{mark}"))
            self._note_prose(self._text[: len(self._text) - kept])
            self._take(len(self._text) - kept)
            return False
        before = self._text[:found]
        start = len(
            before.removesuffix("</") if before.endswith("</") else before.removesuffix("<")
        )
        self._note_prose(self._text[:start])
        self._take(start)
        if self._text.startswith(end_tag):
            self._take(len(end_tag))
            self._end_invoke()
        elif self._text.startswith(tag):
            header, is_known = self._header(self._parameter_header, len(tag))
            if header is None:
                self._invoke.is_sound &= not is_known
                self._take(len(tag) if is_known else 0)
                return is_known
            self._take(header.end())
            self._key = (header[1], header[2] == "true")
            self._state = self._in_value
        elif end_tag.startswith(self._text) or tag.startswith(self._text):
            return False
        else:  # the call ends without its end tag, or its markup is broken
            others = (f"<{mark}{invoke}", f"</{mark}")
            if any(other.startswith(self._text) for other in others):
                return False
            self._invoke.is_sound = False
            if self._text.startswith(others[0]):
                self._end_invoke()
            else:
                self._take(found - start + len(mark))
        return True

    def _in_value(self) -> bool:
        end_tag = f"</{self._tags.mark}{self._tags.parameter}>"
        end = self._text.find(end_tag, self._found)
        if end < 0:
            self._found = max(self._found, len(self._text) - len(end_tag) + 1)
            return False
        name, is_string = self._key
        value: Any = self._text[:end]
        if not is_string:
            # What is no JSON is told as the model wrote it.
            with suppress(ValueError):
                value = from_json(value)
        self._invoke.arguments[name] = value
        self._take(end + len(end_tag))
        self._state = self._in_parameters
        return True

    def _end_invoke(self) -> None:
        if self._invoke.is_sound:
            self._calls.append(Call(self._invoke.name, self._invoke.arguments))
        self._state = self._in_section

    def _note_prose(self, text: str) -> None:
        if text.strip() and not self._invoke.arguments:
            self._invoke.is_sound = False

    def _header(self, pattern: re.Pattern[str], start: int) -> tuple[re.Match[str] | None, bool]:
        """The match behind a tag's name, if there is one, and whether that is certain by now."""
        match = pattern.match(self._text, start)
        mark = self._text.find(self._tags.mark, start)
        if match and (mark < 0 or match.end() <= mark):
            return match, True
        return None, mark >= 0

    def _partial(self, tag: str) -> int:
        """How many characters at the end of the text may be the beginning of ``tag``."""
        for length in range(min(len(tag) - 1, len(self._text)), 0, -1):
            if self._text.endswith(tag[:length]):
                return length
        return 0

    def _take(self, count: int) -> None:
        self._text = self._text[count:]
        self._found = 0


def read(text: str, tags: Tags = Tags()) -> tuple[str, list[Call]]:
    """The text and the calls of a whole answer."""
    reader = Reader(tags)
    prose, calls = reader.feed(text)
    return prose + reader.held, calls


def from_json(text: str) -> Any:
    """The value of a JSON text; ValueError if it has none that can be written as JSON again.

    A line break in a string is broken JSON, but its meaning is clear.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refused, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def to_json(value: object) -> str:
    """The value as JSON, in which only what UTF-8 cannot hold is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large a number")
    return number


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
