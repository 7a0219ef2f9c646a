"""How long the tokens of running answers take while a long prompt comes in."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.rehearsal import soak
from benchmarks.rehearsal.measures import TIMEOUT, Client, random_prompt

STREAMS, PROMPT = 4, 32000
#: Tokens of the answers' own prompts, and seconds in which nothing else comes in.
SHORT, ALONE = 32, 4.0
#: Of an answer: more than it gets to, and few enough that the KV cache holds all of them beside the
#: prompt.
LONG = 1500


def measure(client: Client, streams: int = STREAMS, prompt: int = PROMPT) -> dict[str, Any]:
    """Let so many answers run, and a prompt of so many tokens come in.

    Returns:
        Seconds: ``first_token`` of the long prompt; ``alone`` and ``beside``, quantiles of the time
        between two tokens of an answer before it and during it.
    """
    stop = threading.Event()
    came: list[list[float]] = [[] for _ in range(streams)]
    threads = [
        threading.Thread(target=_answer, args=(client.url, stop, number, came[number]))
        for number in range(streams)
    ]
    for thread in threads:
        thread.start()
    try:
        while not all(came) and any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
        time.sleep(ALONE)
        begin = time.perf_counter()
        first_token = client.seconds([client.prompt(prompt)], 1)
        end = time.perf_counter()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return {
        "streams": streams,
        "prompt": prompt,
        "first_token": first_token,
        "alone": soak.quantiles(gaps(came, begin - ALONE, begin)),
        "beside": soak.quantiles(gaps(came, begin, end)),
    }


def gaps(came: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Seconds between two tokens that follow each other, of those that overlap the time given."""
    return [
        later - sooner
        for times in came
        for sooner, later in itertools.pairwise(times)
        if later > begin and sooner < end
    ]


def _answer(url: str, stop: threading.Event, number: int, came: list[float]) -> None:
    """One long answer; when each part of it came."""
    body = {**soak.body(random_prompt(random.Random(number), SHORT), LONG, 1), "stream": True}
    with (
        httpx.Client(timeout=TIMEOUT, trust_env=False) as http,
        http.stream("POST", f"{url}/generate", json=body) as response,
    ):
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                came.append(time.perf_counter())
            if stop.is_set():
                return
