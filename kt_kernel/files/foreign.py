"""Reading files that another program wrote, or that a disk may have damaged.

Whatever is in them, a reader gets a value of the type it asked for or a :class:`UserError` of one
line: it never waits for a pipe, reads more than a limit or meets a type it did not expect.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt_kernel.errors import UserError

#: Bytes of a JSON file at most: what DeepSeek V3.2 has of each kind is a hundredth of it.
LARGEST_JSON = 16_000_000
#: Bytes of a file of settings or of a secret at most.
LARGEST_TEXT = 1_000_000
#: How long a pipe may be silent.
PIPE_SECONDS = 10
#: Levels of lists and objects in each other; real files have six.
DEEPEST_JSON = 64
#: Integers of a file are sizes and counts: none is larger.
LARGEST_INTEGER = 2**63 - 1

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class FileMissing(UserError):
    """There is no such file."""


class NotJson(UserError):
    """A file holds no JSON object: it is damaged, or of another kind."""


class NotObject(NotJson):
    """A file holds JSON, but no object."""


def open_regular(path: Path) -> int:
    """Open a regular file for reading; the descriptor.

    Raises:
        FileMissing: there is none.
        UserError: it cannot be opened, or is a directory, a pipe or a device.
    """
    try:
        # Opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise FileMissing(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # a zero byte, or no Unicode
        raise UserError(f"cannot read {path}: that is no file name") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"cannot read {path}: it is {kind}, expected a file")
    return fd


def read_file(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """The content of a regular file.

    Raises:
        FileMissing: there is none.
        UserError: it cannot be read or has more than ``limit`` bytes.
    """
    content = read_start(path, limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is larger than a file of its kind: expected at most {limit} bytes")
    return content


def read_start(path: Path, count: int) -> bytes:
    """The first ``count`` bytes of a regular file, or all of a shorter one.

    Raises:
        FileMissing: there is none.
        UserError: it cannot be read.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(min(count, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_stream(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """The content of a file that a user names; it may be a pipe, such as a shell's ``<(...)``.

    Raises:
        OSError: it cannot be read, has more than ``limit`` bytes, or is a pipe that stays silent.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0) as file:
        ready = select.poll()
        ready.register(file, select.POLLIN)
        content = b""
        while len(content) <= limit:
            if not ready.poll(1000 * PIPE_SECONDS):
                raise OSError(errno.ETIME, "it is a pipe to which nothing is written", str(path))
            part = os.read(file.fileno(), limit + 1 - len(content))
            if not part:
                return content
            content += part
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is no JSON, or has more than ``DEEPEST_JSON`` levels; says why.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(text)
        if is_deeper(value, DEEPEST_JSON):
            raise RecursionError
        if _SURROGATE.search(text):  # half a character cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it has more than {DEEPEST_JSON} levels") from None
    except UnicodeEncodeError:
        raise ValueError("a text in it is not Unicode") from None
    return value


def is_deeper(document: object, depth: int) -> bool:
    """Whether lists and objects of parsed JSON lie more than ``depth`` deep inside one another."""
    level = [document]
    for _ in range(depth):
        lists = (v for v in level if isinstance(v, list))
        objects = (v.values() for v in level if isinstance(v, dict))
        level = [v for vs in (*lists, *objects) for v in vs if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def read_fields(path: Path, limit: int = LARGEST_JSON, advice: str = "") -> Fields:
    """The JSON object in a file; ``advice`` is what to do about a damaged one.

    Raises:
        FileMissing: there is no file.
        NotJson: it is not JSON, or (NotObject) something else than an object.
        UserError: it cannot be read.
    """
    content = read_file(path, limit)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise NotJson(_advised(f"{path} is not valid JSON ({error})", advice)) from None
    if not isinstance(value, dict):
        raise NotObject(_advised(f"{path} holds {shown(value)}, expected a JSON object", advice))
    return Fields(value, str(path))


def _advised(problem: str, advice: str) -> str:
    return f"{problem}: {advice}" if advice else problem


def shown(value: object) -> str:
    """A JSON value for an error message; never long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


class Fields:
    """The fields of a JSON object, each checked when it is asked for.

    ``null`` is the same as no field. A field with a ``default`` may be absent.

    Args:
        values: the object.
        where: file that it is from.
        prefix: names of the fields that lead to it, each with a dot behind it.

    Attributes:
        values: the object.
    """

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self._where, self._prefix = where, prefix

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return self.values.get(name) is not None

    def error(self, name: str, expected: str) -> UserError:
        """The error that a field is not as ``expected``."""
        value = self.values.get(name)
        if value is None:
            return UserError(f"{self._where} has no {self._prefix}{name}: expected {expected}")
        return UserError(
            f"{self._where}: {self._prefix}{name} is {shown(value)}, expected {expected}"
        )

    def integer(
        self,
        name: str,
        minimum: int = 0,
        maximum: int = LARGEST_INTEGER,
        default: int | None = None,
    ) -> int:
        """An integer between the bounds, both included."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not minimum <= value <= maximum:
            bounds = f">= {minimum}" if maximum == LARGEST_INTEGER else f"{minimum} to {maximum}"
            raise self.error(name, f"an integer {bounds}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number that is not negative."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e300:
            raise self.error(name, "a finite number >= 0")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def array(self, name: str, default: list[Any] | None = None) -> list[Any]:
        """A list, of whatever."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, list):
            raise self.error(name, "a list")
        return value

    def integers(
        self, name: str, maximum: int = LARGEST_INTEGER, default: list[int] | None = None
    ) -> list[int]:
        """A list of integers from 0 to ``maximum``."""
        values = self.array(name, default)
        if not all(type(value) is int and 0 <= value <= maximum for value in values):
            raise self.error(name, f"a list of integers from 0 to {maximum}")
        return values

    def texts(self, name: str, default: dict[str, str] | None = None) -> dict[str, str]:
        """An object whose fields are texts."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, dict):
            raise self.error(name, "an object of texts")
        fields = Fields(value, self._where, f"{self._prefix}{name}.")
        return {key: fields.text(key) for key in value}

    def inner(self, name: str, optional: bool = False) -> Fields:
        """The fields of an object in a field; none of an ``optional`` one that is absent."""
        value = self.values.get(name)
        if value is None and optional:
            value = {}
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(value, self._where, f"{self._prefix}{name}.")

    def each(self) -> Iterator[tuple[str, Fields]]:
        """Every field's name with its fields: all must be objects."""
        for name in self.values:
            yield name, self.inner(name)
