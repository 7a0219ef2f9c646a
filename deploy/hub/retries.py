"""When to ask the Hub again, and how long to wait before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from deploy.console import say
from kt_kernel.errors import UserError

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0  # seconds between attempts
#: The most that a server's Retry-After is followed.
LONGEST_RETRY_AFTER = 900.0


class HubUnreachable(UserError):
    """The Hub does not answer, or not now; a finished download can do without it.

    Attributes:
        reason: the message without the advice.
        may_pass: whether the same request may succeed a little later.
        wait: seconds that the server asks to wait before; None if it does not say.
    """

    def __init__(
        self, reason: str, advice: str, may_pass: bool = True, wait: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {advice}")
        self.reason, self.may_pass, self.wait = reason, may_pass, wait


class Stopped(Exception):
    """Nobody waits for the result any more."""


def with_retries(
    ask: Callable[[], T],
    retries: int,
    done: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> T:
    """What ``ask`` returns, asked again after a failure that may pass.

    Args:
        ask: raises HubUnreachable if it fails.
        retries: how often to ask again without getting further.
        done: how far ``ask`` has come, counting up; getting further than ever before makes the
            number of attempts and the wait begin again.
        stop: ends the waiting.

    Raises:
        HubUnreachable: of the last attempt.
        Stopped: ``stop`` was set.
    """
    stop = stop or threading.Event()
    left, wait, furthest = retries, FIRST_WAIT, done()
    while True:
        try:
            return ask()
        except HubUnreachable as error:
            if (now := done()) > furthest:
                left, wait, furthest = retries, FIRST_WAIT, now
            if not error.may_pass or left == 0:
                raise
            left -= 1
            seconds = wait if error.wait is None else error.wait
            say(f"warning: {error.reason}: trying again in {seconds:.0f} s")
        if stop.wait(seconds):
            raise Stopped
        wait = min(2 * wait, LONGEST_WAIT)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: Retry-After as a number or a date, or ``ratelimit``.

    None if it asks for nothing that can be understood.
    """
    from huggingface_hub.utils import parse_ratelimit_headers

    text = headers.get("retry-after", "").strip()
    try:
        seconds = _seconds_asked(text) if text else None
        if not text and (limit := parse_ratelimit_headers(headers)) and limit.remaining == 0:
            seconds = float(limit.reset_in_seconds)
    except (ValueError, OverflowError):  # no date, or a number that none can have
        return None
    return None if seconds is None else min(max(0.0, seconds), LONGEST_RETRY_AFTER)


def _seconds_asked(text: str) -> float:
    """Seconds from now that a Retry-After means, which may be past; ValueError, OverflowError."""
    if text.isascii() and text.isdigit():
        return float(text)
    date = parsedate_to_datetime(text)
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return (date - datetime.fromtimestamp(time.time(), UTC)).total_seconds()
