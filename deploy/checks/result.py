"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check ended."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        expected: what is needed, to follow the word "expected".
        found: what is there, to follow the word "found".
        todo: what to do about it; empty for a PASS.
    """

    status: Status
    expected: str
    found: str
    todo: str = ""


def fail_unless(good: bool, expected: str, found: str, todo: str) -> Finding:
    """A PASS with nothing to do, or a FAIL."""
    return Finding(Status.PASS if good else Status.FAIL, expected, found, "" if good else todo)


def warn_unless(good: bool, expected: str, found: str, todo: str) -> Finding:
    """A PASS with nothing to do, or a WARN."""
    return Finding(Status.PASS if good else Status.WARN, expected, found, "" if good else todo)


@dataclass(frozen=True, kw_only=True)
class Result(Finding):
    """A finding under the name of its check, as reports show it."""

    check: str

    def sentence(self) -> str:
        """One line without the status."""
        text = f"{self.check}: expected {self.expected}, found {self.found}"
        return f"{text}: {self.todo}" if self.todo else text
