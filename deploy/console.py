"""Where the stages talk to people: standard error, one line at a time.

Standard output is for results: printed commands, reports, the model's answer.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO, cast

from kt_kernel.errors import without_passwords


def say(line: str) -> None:
    """Print a line at once, also when the output is a pipe or a log file; passwords are masked."""
    print(without_passwords(line), file=sys.stderr, flush=True)


def time_lines() -> None:
    """Let each line of a log begin with the time, as SGLang's do; not on a terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not stream.isatty():
            setattr(sys, name, cast(TextIO, _TimedLines(stream)))


class _TimedLines:
    """A text stream that writes whole lines, each with the time before it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = threading.local()  # `print` hands over a line and its end one by one

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        self._begun.text = rest
        if lines:
            now = time.strftime("[%Y-%m-%d %H:%M:%S]")
            self._stream.write("".join(f"{now} {line}\n" for line in lines))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
