"""Types of setting values: how a text from the environment becomes a value.

Each type has ``expected``, the words for error messages and docs, and ``parse``, which returns the
value or raises ``ValueError``. The settings table adds the words ``auto`` and ``none`` where a
setting allows them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kt_kernel.files.foreign import parse_json
from kt_kernel.host.cpus import CPU_LIMIT, parse_cpu_list

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class BadValue(ValueError):
    """No valid value; the message says why, after what was expected and found."""


class ValueType(Protocol):
    """What the settings table needs of a type."""

    @property
    def expected(self) -> str:
        """What a valid value is, to follow the word "expected"."""

    def parse(self, text: str) -> Any:
        """The value of ``text``; ValueError if it has none."""


def _bounds(minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum:g} to {maximum:g}"
    if minimum is not None:
        return f" of at least {minimum:g}"
    return "" if maximum is None else f" of at most {maximum:g}"


@dataclass(frozen=True)
class Integer:
    """A decimal integer within bounds (both included)."""

    minimum: int | None = None
    maximum: int | None = None

    @property
    def expected(self) -> str:
        return f"an integer{_bounds(self.minimum, self.maximum)}"

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError(text)
        value = int(text)
        if (self.minimum is not None and value < self.minimum) or (
            self.maximum is not None and value > self.maximum
        ):
            raise ValueError(text)
        return value


@dataclass(frozen=True)
class Number:
    """A finite decimal number; ``above`` is an open lower bound, ``maximum`` is included."""

    above: float | None = None
    maximum: float | None = None

    @property
    def expected(self) -> str:
        words = "a number"
        if self.above is not None:
            words += f" above {self.above:g}"
        if self.maximum is not None:
            words += f" and at most {self.maximum:g}"
        return words

    def parse(self, text: str) -> float:
        if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", text):
            raise ValueError(text)
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(text)
        if (self.above is not None and value <= self.above) or (
            self.maximum is not None and value > self.maximum
        ):
            raise ValueError(text)
        return value


@dataclass(frozen=True)
class Boolean:
    """1/0, true/false, yes/no, on/off in any case."""

    @property
    def expected(self) -> str:
        return "1/0, true/false, yes/no or on/off"

    def parse(self, text: str) -> bool:
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise ValueError(text)


@dataclass(frozen=True)
class AlwaysTrue:
    """A switch of the tutorial's that this project cannot turn off."""

    @property
    def expected(self) -> str:
        return ", ".join(_TRUE[:-1]) + f" or {_TRUE[-1]}"

    def parse(self, text: str) -> bool:
        if not Boolean().parse(text):
            raise BadValue("there is no other way here")
        return True


@dataclass(frozen=True)
class Choice:
    """One of some words, exactly as written."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.words)

    def parse(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class Text:
    """Any text, or text that matches a pattern which ``what`` puts in words."""

    what: str = "text"
    pattern: str = r".+"

    @property
    def expected(self) -> str:
        return self.what

    def parse(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text, re.DOTALL):
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class CpuList:
    """A list of CPUs as the kernel writes them, which stays a text: others read the variable."""

    @property
    def expected(self) -> str:
        return f"CPUs as in 0-3,8, with ids below {CPU_LIMIT}"

    def parse(self, text: str) -> str:
        if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise ValueError(text)
        parse_cpu_list(text)
        return text


@dataclass(frozen=True)
class FilePath:
    """A path of a file or directory, which need not exist. ``~`` is the home directory.

    Raises:
        BadValue: from :meth:`parse`, if there is no home directory.
    """

    @property
    def expected(self) -> str:
        return "a path"

    def parse(self, text: str) -> Path:
        if "\0" in text:
            raise ValueError(text)
        try:
            return Path(text).expanduser() if text.startswith("~") else Path(text)
        except RuntimeError:
            user = Path(text).parts[0].removeprefix("~")
            why = f"there is no user {user}" if user else "this user has none and HOME is not set"
            raise BadValue(f"{why}, write the path of the home directory") from None


@dataclass(frozen=True)
class JsonObject:
    """A JSON object, for example ``{"index_topk": null}``."""

    @property
    def expected(self) -> str:
        return "a JSON object"

    def parse(self, text: str) -> dict[str, Any]:
        value = parse_json(text)
        if not isinstance(value, dict):
            raise ValueError(text)
        return value


@dataclass(frozen=True)
class ShellWords:
    """Command-line words, split and quoted as in a shell (no variables, no globs)."""

    @property
    def expected(self) -> str:
        return "words quoted as in a shell"

    def parse(self, text: str) -> list[str]:
        return shlex.split(text)


@dataclass(frozen=True)
class Names:
    """Names out of a fixed list, separated by commas; or ``all`` of them."""

    known: tuple[str, ...]

    @property
    def expected(self) -> str:
        return "all, or names separated by commas out of " + ", ".join(self.known)

    def parse(self, text: str) -> tuple[str, ...]:
        if text.strip().lower() == "all":
            return self.known
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if not names or not set(names) <= set(self.known):
            raise ValueError(text)
        return names


BOOLEAN = Boolean()
PORT = Integer(1, 65535)
HOST = Text("a host name or address", r"[\w.:%-]+")
ORIGINS = Text(
    "origins as in https://host:port, separated by commas",
    r"https?://[\w.:\[\]-]+(,https?://[\w.:\[\]-]+)*",
)
URL = Text("a URL that starts with http:// or https://", r"https?://[^\s/]+\S*")
REPOSITORY = Text("a repository as organisation/name", r"[\w.-]+/[\w.-]+")
#: It is sent in a header, which holds ASCII.
TOKEN = Text("ASCII characters without spaces", r"[!-~]+")
