"""``python -m benchmarks.hosts``: users, prompt, answer -> hosts, and how long they wait."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.hosts.simulation import Load, Request, simulate
from benchmarks.hosts.speeds import PUBLISHED, Speeds, read_speeds
from benchmarks.markdown import table
from benchmarks.stats import quantile
from deploy.settings.tutorial import REQUESTS, TOKENS

USERS = (1, 5, 20, 50)
#: A question, and a question about a text of some pages.
TALKS = ((500, 300), (4000, 300))
#: Of twenty first tokens one may take longer, in seconds, and of two answers one may be slower, in
#: tokens a second. People read some five.
TARGET, SLOWEST = 15.0, 3.0
MOST_HOSTS = 64


def hosts_for(load: Load, speeds: Speeds, target: float, most: int) -> tuple[int, list[Request]]:
    """The smallest number of hosts that keeps the target, and what was answered then.

    Raises:
        BenchmarkError: no number does, since one request alone takes longer.
    """

    def kept(found: Sequence[Request]) -> bool:
        return first_token(found) <= target and rate(found, load.answer) >= SLOWEST

    low, high, found = 1, 1, simulate(load, [speeds], most)
    while not kept(found):
        if high >= MOST_HOSTS:
            raise BenchmarkError(
                f"{MOST_HOSTS} hosts give {load.users} users no first token after {target:g} s and "
                f"{SLOWEST:g} tokens/s: one request alone takes "
                f"{speeds.prompt(load.prompt):.1f} s and has {1 / speeds.step(1):.1f} tokens/s"
            )
        low, high = high + 1, 2 * high
        found = simulate(load, [speeds] * high, most)
    while low < high:
        middle = (low + high) // 2
        tried = simulate(load, [speeds] * middle, most)
        if kept(tried):
            high, found = middle, tried
        else:
            low = middle + 1
    return high, found


def first_token(requests: Sequence[Request], share: float = 0.95) -> float:
    """Seconds to the first token that so many of the requests do not exceed."""
    return quantile([request.first - request.asked for request in requests], share)


def rate(requests: Sequence[Request], answer: int) -> float:
    """Tokens a second of the median answer after its first token."""
    return quantile([(answer - 1) / (r.end - r.first) for r in requests], 0.5)


def rows(speeds: Speeds, target: float, requests: int, tokens: int) -> list[list[str]]:
    """The table's body.

    Args:
        requests, tokens: that a host computes together, and that its KV cache holds.
    """
    found = []
    for prompt, answer in TALKS:
        for users in USERS:
            load = Load(users, prompt, answer)
            most = max(1, min(requests, tokens // (prompt + answer)))
            hosts, answered = hosts_for(load, speeds, target, most)
            found.append(
                [
                    *map(str, (users, prompt, answer, hosts)),
                    f"{first_token(answered):.1f}",
                    f"{rate(answered, answer):.1f}",
                ]
            )
    return found


HEAD = ("users", "prompt", "answer", "hosts", "p95 s to the first token", "tokens/s of an answer")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=__doc__)
    parser.add_argument(
        "--json", type=Path, help="of a rehearsal; the default is docs/performance.md's host"
    )
    parser.add_argument(
        "--target", type=float, default=TARGET, help="p95 of the seconds to the first token"
    )
    parser.add_argument(
        "--requests", type=int, default=REQUESTS, help="KT_MAX_RUNNING_REQUESTS of each host"
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="KT_MAX_TOTAL_TOKENS of each host"
    )
    args = parser.parse_args(argv)
    try:
        speeds = PUBLISHED if args.json is None else read_speeds(args.json)
        print("\n".join(table(HEAD, rows(speeds, args.target, args.requests, args.tokens))))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
