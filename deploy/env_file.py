"""Files of ``NAME=value`` lines, as ``--env-file`` takes them.

The syntax is what ``docker compose`` reads in the same files: comments, blank lines, ``export``,
single and double quotes. Variables are not expanded, so ``${...}`` is an error rather than a
surprise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import UserErrors

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)", re.DOTALL)
_DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_SINGLE = re.compile(r"'([^']*)'\s*(?:#.*)?")
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "$": "$"}


@dataclass(frozen=True)
class Assignment:
    """One line of an env file; ``where`` is ``file:line`` for messages."""

    name: str
    value: str
    where: str


def read_env_file(path: Path) -> list[Assignment]:
    """The assignments of a file, in its order.

    Raises:
        UserErrors: the file cannot be read, or has lines that are no assignments or set a name
            twice; one message per line.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UserErrors([f"--env-file {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise UserErrors([f"--env-file {path} is not a text file in UTF-8"]) from None
    found: dict[str, Assignment] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        if match is None:
            problems.append(f"{where}: expected NAME=value, found {stripped!r}")
            continue
        name, raw = match.groups()
        try:
            value = _unquote(raw)
        except ValueError as error:
            problems.append(f"{where}: {name} {error}")
            continue
        if name in found:
            problems.append(f"{where}: {name} is set again, first at {found[name].where}")
            continue
        found[name] = Assignment(name, value, where)
    if problems:
        raise UserErrors(problems)
    return list(found.values())


def _unquote(raw: str) -> str:
    if raw.startswith("'"):
        match = _SINGLE.fullmatch(raw)
        if match is None:
            raise ValueError("has an opening ' but no closing one at the end")
        return match[1]
    if raw.startswith('"'):
        match = _DOUBLE.fullmatch(raw)
        if match is None:
            raise ValueError('has an opening " but no closing one at the end')
        _refuse_expansion(re.sub(r"\\.", "", match[1]))
        return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), match[1])
    value = re.sub(r"(^|\s)#.*", "", raw).strip()
    _refuse_expansion(value)
    return value


def _refuse_expansion(value: str) -> None:
    if "${" in value:
        raise ValueError("has ${...}, which is not expanded here: write the value itself")
