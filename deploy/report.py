"""Where the stages talk to people: standard error, one line at a time.

Standard output is for results: printed commands, reports, the model's answer.
"""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Print a line at once, also when the output is a pipe or a log file."""
    print(line, file=sys.stderr, flush=True)
