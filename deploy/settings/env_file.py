"""Files of ``NAME=value`` lines, as ``--env-file`` takes them.

``docker compose`` reads the same files, and both give a setting the same value: comments,
``export``, quotes, escapes, values of several lines, and variables, which are taken from the
environment or, if it does not have them, from earlier lines. What compose reads in a way that
nobody means (a name without value, a name that is set twice, text behind a closing quote) is an
error here. ``tests/docker/test_env_file.py`` asks compose itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.console import say
from deploy.errors import UserErrors
from deploy.settings.variables import may_show, shown_name
from kt_kernel.files.foreign import LARGEST_TEXT, read_stream

#: Go's unicode.IsSpace, and the part of it that does not end a line for compose.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
_SPACES += "\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANKS = "\t\v\f\r \x85\xa0"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SEPARATOR = re.compile(r"[=:\n]")
_ESCAPE = re.compile(r'\\(?:[abcfnrtv$"\\]|0[0-9]{0,3})')
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPES |= {"\\": "\\", '"': '"', "$": "$$"}
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|(\{))")
_BRACED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:?)([-+?])(.*))?")
#: Variables in the defaults of variables in the defaults ...
_DEPTH = 16


@dataclass(frozen=True)
class Assignment:
    """One assignment of an env file; ``where`` is ``file:line`` for messages."""

    name: str
    value: str
    where: str


def read_env_file(path: Path, environ: Mapping[str, str] | None = None) -> list[Assignment]:
    """The assignments of a file, in its order.

    Args:
        path: the file.
        environ: variables that its values may use, before those of its earlier lines.

    Raises:
        UserErrors: the file cannot be read, or has lines that are no assignments or set a name
            twice; one message per line.
    """
    try:
        text = read_stream(path).decode("utf-8-sig")
    except OSError as error:
        raise UserErrors([f"--env-file {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise UserErrors([f"--env-file {path} is not a text file in UTF-8"]) from None
    except ValueError:  # a NUL in the path
        raise UserErrors([f"--env-file {str(path)!r}: expected a path"]) from None
    reader = _Reader(path, text, environ or {})
    reader.read()
    if reader.problems:
        raise UserErrors(reader.problems)
    return list(reader.found.values())


class _Needed(ValueError):
    """A variable is not set; the message has its name and the file's own words."""


class _Reader:
    """Reads one file from its beginning to its end."""

    def __init__(self, path: Path, text: str, environ: Mapping[str, str]) -> None:
        self._path, self._text, self._environ = path, text, environ
        self._at = 0
        self._counted, self._number = 0, 1  # up to where lines are counted, and how many
        self._used = 0  # characters of variables
        self.found: dict[str, Assignment] = {}
        self.problems: list[str] = []

    def read(self) -> None:
        while self._skip_to_statement():
            start = self._at
            self._number += self._text.count("\n", self._counted, start)
            self._counted = start
            where = f"{self._path}:{self._number}"
            try:
                name = self._name()
            except ValueError:
                self._at = start
                self._line()
                self.problems.append(
                    f"{where}: expected NAME=value, found another line (not shown, it may be part "
                    f"of a secret)"
                )
                continue
            try:
                value = self._value(name, where)
            except ValueError as error:
                needed = isinstance(error, _Needed) and not may_show(name)
                why = "needs a variable that is not set" if needed else error
                self.problems.append(f"{where}: {shown_name(name)} {why}")
                self._at = start
                self._line()
                continue
            if name in self.found:
                first = self.found[name].where
                self.problems.append(f"{where}: {shown_name(name)} is set again, first at {first}")
            else:
                self.found[name] = Assignment(name, value, where)

    def _line(self) -> str:
        """The rest of the line, which is passed."""
        start, end = self._at, self._text.find("\n", self._at)
        end = len(self._text) if end < 0 else end
        self._at = end + 1
        return self._text[start:end]

    def _skip_to_statement(self) -> bool:
        while self._at < len(self._text):
            if self._text[self._at] in _SPACES:
                self._at += 1
            elif self._text[self._at] == "#":
                self._line()
            else:
                return True
        return False

    def _skip_blanks(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in _BLANKS:
            self._at += 1

    def _name(self) -> str:
        if re.match(rf"export[{_BLANKS}]", self._text[self._at : self._at + 7]):
            self._at += len("export")
            self._skip_blanks()
        end = _SEPARATOR.search(self._text, self._at)
        if end is None or end[0] == "\n":
            raise ValueError
        name = self._text[self._at : end.start()].rstrip(_BLANKS)
        if not _NAME.fullmatch(name):
            raise ValueError
        self._at = end.end()
        self._skip_blanks()
        return name

    def _value(self, name: str, where: str) -> str:
        """The value that begins here; ValueError with what is wrong with it."""
        quote = self._text[self._at : self._at + 1]
        if quote not in ("'", '"'):
            raw = self._line().partition(" #")[0].rstrip(_SPACES)
            value = self._expand(raw, name, where)
        else:
            raw = self._quoted(quote)
            value = raw if quote == "'" else self._expand(_ESCAPE.sub(_unescape, raw), name, where)
        if "\0" in value:
            raise ValueError("has a NUL character, which no variable can hold")
        return value

    def _quoted(self, quote: str) -> str:
        match = re.compile(rf"{quote}((?:[^{quote}\\]|\\.)*){quote}", re.DOTALL).match(
            self._text, self._at
        )
        if match is None:
            raise ValueError(f"has an opening {quote} but no closing one at the end")
        self._at = match.end()
        end = self._at
        rest = self._line().strip(_SPACES)
        self._at = end
        if rest and not rest.startswith("#"):
            raise ValueError(f"has text behind the closing {quote}")
        return re.sub(
            rf"(\\.)|{quote}",
            lambda m: quote if m[0] == f"\\{quote}" else m[0],
            match[1],
            flags=re.DOTALL,
        )

    def _expand(self, value: str, name: str, where: str) -> str:
        def lookup(variable: str) -> str | None:
            found = self._environ.get(variable)
            if found is None and variable in self.found:
                found = self.found[variable].value
            # Lines that each use an earlier one twice would double without end.
            self._used += len(found or "")
            if self._used > LARGEST_TEXT:
                raise ValueError(
                    f"and earlier lines use variables of {self._used} characters, expected at most "
                    f"{LARGEST_TEXT}"
                )
            return found

        def missing(variable: str) -> None:
            # The rest of a password may look like a variable.
            shown = f"${variable}" if may_show(name) else "a variable"
            say(
                f"warning: {where}: {shown_name(name)} uses {shown}, which is not set: taken as "
                f"empty, as by compose; write $$ for a dollar sign"
            )

        return _substitute(value, lookup, missing, 0)


def _unescape(match: re.Match[str]) -> str:
    code = match[0][1:]
    if not code.startswith("0"):
        return _ESCAPES.get(code, match[0])
    digits = code[1:]
    if re.fullmatch("[0-3][0-7]{2}", digits):
        return chr(int(digits, 8))
    return f"\\{digits}"


def _substitute(
    value: str,
    lookup: Callable[[str], str | None],
    missing: Callable[[str], None],
    depth: int,
) -> str:
    """``value`` with ``$NAME``, ``${NAME...}`` and ``$$`` replaced; ValueError if it cannot be."""
    if depth > _DEPTH:
        raise ValueError(f"has more than {_DEPTH} variables inside each other")
    parts, position = list[str](), 0
    while match := _VARIABLE.search(value, position):
        parts.append(value[position : match.start()])
        position = match.end()
        if match[1]:
            parts.append("$")
        elif match[2]:
            found = lookup(match[2])
            if found is None:
                missing(match[2])
            parts.append(found or "")
        else:
            end = _closing_brace(value, position)
            parts.append(_braced(value[position:end], lookup, missing, depth))
            position = end + 1
    return "".join(parts) + value[position:]


def _closing_brace(value: str, position: int) -> int:
    opened = 1
    for i in range(position, len(value)):
        opened += {"{": 1, "}": -1}.get(value[i], 0)
        if opened == 0:
            return i
    raise ValueError("has ${ without the } that belongs to it; write $$ for a dollar sign")


def _braced(
    inside: str,
    lookup: Callable[[str], str | None],
    missing: Callable[[str], None],
    depth: int,
) -> str:
    match = _BRACED.fullmatch(inside)
    if match is None:
        raise ValueError(
            "has ${...} in a form that compose does not know: expected ${NAME} or "
            "${NAME:-default}; write $$ for a dollar sign"
        )
    name, colon, operator, word = match.groups()
    found = lookup(name)
    is_set = found is not None and (not colon or found != "")
    if operator == "+":
        return _substitute(word, lookup, missing, depth + 1) if is_set else ""
    if is_set:
        return found or ""
    if operator == "-":
        return _substitute(word, lookup, missing, depth + 1)
    if operator == "?":
        raise _Needed(f"needs the variable {name}, which is not set: {word}")
    if found is None:
        missing(name)
    return ""
