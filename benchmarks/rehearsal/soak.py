"""A server under load for minutes: does anything grow, do its answers stay, how long do users wait?

Streams ask without a pause, each a prompt of another length; of every three requests one is broken
off by its client. Greedy answers of a fixed set are asked of the idle server before and after.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from benchmarks.rehearsal.measures import TIMEOUT, Client, card_bytes, random_prompt
from benchmarks.server import Server

STREAMS = 16
#: Tokens of the prompts: as many of 10 to 100 as of 100 to 1000.
SHORTEST, LONGEST = 10, 4000
#: Tokens of the answers, even.
FEWEST, MOST = 8, 128
#: One of so many requests is broken off.
ABORTED = 3
FIXED_PROMPTS, FIXED_TOKENS = (16, 64, 256, 1024), 32
SECONDS_BETWEEN_SAMPLES = 10.0
#: Of the samples, the share at the beginning and at the end that growth is measured between, after
#: the first of them, in which pools fill.
_SHARE = 0.2


@dataclass
class Seen:
    """What the streams saw; seconds. Filled by all of them."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    finished: int = 0
    aborted: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


def soak(server: Server, client: Client, minutes: float, streams: int = STREAMS) -> dict[str, Any]:
    """Load the server for so many minutes; what was seen, for JSON.

    Returns:
        ``first_token`` and ``between_tokens``: quantiles in seconds; ``finished``, ``aborted``,
        ``errors`` and the first of them; ``answers_unchanged`` of the fixed set; ``samples`` of
        what the server holds and the ``growth`` between them.
    """
    fixed = [client.prompt(tokens) for tokens in FIXED_PROMPTS]
    before = [_greedy(client, prompt) for prompt in fixed]
    seen = Seen()
    stop = threading.Event()
    threads = [
        threading.Thread(target=_ask_until, args=(stop, client.url, number, seen))
        for number in range(streams)
    ]
    samples = []
    started = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while (passed := time.monotonic() - started) < minutes * 60:
            samples.append({"second": round(passed, 1), **held(server)})
            stop.wait(min(SECONDS_BETWEEN_SAMPLES, max(0.1, minutes * 60 - passed)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    samples.append({"second": round(time.monotonic() - started, 1), **held(server)})
    after = [_greedy(client, prompt) for prompt in fixed]
    return {
        "minutes": minutes,
        "streams": streams,
        "first_token": quantiles(seen.first),
        "between_tokens": quantiles(seen.between),
        "finished": seen.finished,
        "aborted": seen.aborted,
        "errors": len(seen.errors),
        "first_errors": seen.errors[:10],
        "answers_unchanged": before == after,
        "samples": samples,
        "growth": growth(samples),
    }


def held(server: Server) -> dict[str, int]:
    """What the server's processes hold now: bytes (pinned ones, too), threads, open files."""
    return {"memory": server.memory_bytes(), "card": card_bytes() or 0, **server.held()}


def growth(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """By how much the median of the last fifth of the samples is above that of the second fifth.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples: expected at least one")
    size = max(1, int(len(samples) * _SHARE))
    early, late = samples[size : 2 * size] or samples[:1], samples[-size:]
    return {
        name: statistics.median(s[name] for s in late) - statistics.median(s[name] for s in early)
        for name in samples[0]
        if name != "second"
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """``p50``, ``p99`` and ``most`` of the values, and their ``count``; only that without any."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return {"p50": at(0.5), "p99": at(0.99), "most": ordered[-1], "count": len(ordered)}


def sentences(found: dict[str, Any]) -> list[str]:
    """What the owner of the machine wants to know of it."""
    grown = found["growth"]
    wait, pace = found["first_token"], found["between_tokens"]
    lines = [
        f"Under load: {found['minutes']:g} minutes of {found['streams']} streams, "
        f"{found['finished']} answers and {found['aborted']} broken off, "
        f"{found['errors'] or 'no'} errors."
    ]
    if wait["count"] and pace["count"]:
        lines.append(
            f"  First token after {wait['p50']:.2f} s (median), {wait['p99']:.2f} s (99%); from "
            f"token to token {pace['p50'] * 1e3:.0f} ms, {pace['p99'] * 1e3:.0f} ms (99%)."
        )
    lines.append(
        f"  From the second fifth of the time to the last: memory {grown['memory'] / 1e6:+.0f} MB, "
        f"GPU memory {grown['card'] / 1e6:+.0f} MB, threads {grown['threads']:+.0f}, open files "
        f"{grown['files']:+.0f}. Answers of a fixed set are "
        + ("the same as before." if found["answers_unchanged"] else "NOT the same as before.")
    )
    return lines


# ---- the load ----------------------------------------------------------------------------------


def _greedy(client: Client, prompt: list[int]) -> list[int]:
    """The idle server's answer, computed anew."""
    httpx.post(f"{client.url}/flush_cache", headers=client.admin, timeout=60).raise_for_status()
    response = httpx.post(
        f"{client.url}/generate", json=body(prompt, FIXED_TOKENS, 0), timeout=TIMEOUT
    )
    response.raise_for_status()
    answer: list[int] = response.json()["output_ids"]
    return answer


def body(prompt: Sequence[int], tokens: int, temperature: float) -> dict[str, Any]:
    """A request for so many tokens, no fewer."""
    return {
        "input_ids": list(prompt),
        "sampling_params": {
            "max_new_tokens": tokens,
            "temperature": temperature,
            "ignore_eos": True,
        },
    }


def _ask_until(stop: threading.Event, url: str, number: int, seen: Seen) -> None:
    """One stream: a request after the other."""
    rng = random.Random(number)
    with httpx.Client(timeout=TIMEOUT, trust_env=False) as http:
        for count in range(number, 1 << 30):
            if stop.is_set():
                return
            length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
            tokens = rng.randint(FEWEST, MOST)
            leave_after = rng.randint(1, tokens - 1) if count % ABORTED == 0 else None
            asked = {**body(random_prompt(rng, length), tokens, 1), "stream": True}
            try:
                _stream(http, f"{url}/generate", asked, leave_after, seen)
            except (httpx.HTTPError, ValueError) as error:
                with seen.lock:
                    seen.errors.append(f"{type(error).__name__}: {error}")
                stop.wait(1)


def _stream(
    http: httpx.Client, url: str, asked: dict[str, Any], leave_after: int | None, seen: Seen
) -> None:
    """One answer; after ``leave_after`` of its tokens the connection is closed."""
    started = time.perf_counter()
    came: list[tuple[float, int]] = []  # when, and how many tokens there were then
    with http.stream("POST", url, json=asked) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            if "error" in (part := json.loads(line.removeprefix("data: "))):
                raise ValueError(str(part["error"])[:200])
            came.append((time.perf_counter(), part["meta_info"]["completion_tokens"]))
            if leave_after is not None and came[-1][1] >= leave_after:
                break
    with seen.lock:
        seen.first += [when - started for when, _ in came[:1]]
        seen.between += [
            (later - sooner) / (more - fewer)
            for (sooner, fewer), (later, more) in pairwise(came)
            if more > fewer
        ]
        seen.aborted += leave_after is not None
        seen.finished += leave_after is None
