"""What a running server is asked, and how long it takes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.rehearsal.sizes import config_of
from kt_kernel.host.gpus import find_gpu

#: Tokens of the shorter of two answers, whose difference in time is that of decode steps.
SHORT = 8
#: Tokens of the prompts before a decode.
PROMPT = 32
TIMEOUT = 1200.0
#: The engine's totals are renewed ten times a second.
_SETTLED = 0.3


def random_prompt(rng: random.Random, tokens: int) -> list[int]:
    """Random ids, none of a control token."""
    return [rng.randrange(1000, config_of(1)["vocab_size"] - 1000) for _ in range(tokens)]


@dataclass
class Client:
    """Asks a server at ``url``; prompts are random, so that none begins like one before.

    Attributes:
        layers: MoE layers that it has.
        totals: file in which its engine counts.
        admin: headers that open the routes that change the server.
    """

    url: str
    layers: int
    totals: Path
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    admin: Mapping[str, str] = field(default_factory=dict)

    def prompt(self, tokens: int) -> list[int]:
        """Random ids, none of a control token."""
        return random_prompt(self.rng, tokens)

    def seconds(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds until all of these prompts, sent together, have that many new tokens."""
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {
                "max_new_tokens": new_tokens,
                # The likeliest token of random weights is soon the same forever, and so are then
                # its experts, which stay in the cache.
                "temperature": 1,
                "ignore_eos": True,
            },
        }
        started = time.perf_counter()
        response = httpx.post(f"{self.url}/generate", json=body, timeout=TIMEOUT, trust_env=False)
        took = time.perf_counter() - started
        response.raise_for_status()
        made = [answer["meta_info"]["completion_tokens"] for answer in response.json()]
        if made != [new_tokens] * len(prompts):
            raise RuntimeError(f"the server made {made} tokens, expected {new_tokens} of each")
        return took

    def engine_totals(self) -> dict[str, int]:
        """The engine's totals once they have settled; zeros before its first call."""
        time.sleep(_SETTLED)
        try:
            found: dict[str, int] = json.loads(self.totals.read_text())
        except OSError:
            return dict.fromkeys(("calls", "tokens", "experts", "prepare_ns", "workers_ns"), 0)
        return found

    # ---- what is measured ------------------------------------------------------------------------

    def prefill(self, tokens: int, rounds: int) -> list[float]:
        """Seconds to the first token of a prompt, once for each round."""
        return [self.seconds([self.prompt(tokens)], 1) for _ in range(rounds)]

    def decode(self, requests: int, rounds: int, steps: int) -> dict[str, Any]:
        """A decode step of so many requests, from answers that differ in length.

        Returns:
            ``seconds`` of a step, once for each round; and of a layer's calls in a step, two where
            experts are deferred, the mean number of ``experts`` read, and seconds: ``prepare``
            until the workers have them, ``workers`` until they are through.
        """
        shorts: list[float] = []
        longs: list[float] = []
        counted = dict.fromkeys(("experts", "prepare_ns", "workers_ns"), 0)
        for _ in range(rounds):
            before = self.engine_totals()
            shorts.append(self.seconds([self.prompt(PROMPT) for _ in range(requests)], SHORT))
            between = self.engine_totals()
            longs.append(
                self.seconds([self.prompt(PROMPT) for _ in range(requests)], SHORT + steps)
            )
            after = self.engine_totals()
            for name in counted:
                counted[name] += after[name] - 2 * between[name] + before[name]
        turns = self.layers * rounds * steps
        return {
            # One stall of a short answer would make a step of the long one beside it too short.
            "seconds": [(long - min(shorts)) / steps for long in longs],
            "experts": counted["experts"] / turns,
            "prepare": counted["prepare_ns"] / turns / 1e9,
            "workers": counted["workers_ns"] / turns / 1e9,
        }

    def profile(self, folder: Path, steps: int) -> Path | None:
        """The trace of some decode steps of one request, a file; None if the server writes none."""
        folder.mkdir()
        body = {"output_dir": str(folder), "num_steps": steps, "activities": ["GPU"]}
        httpx.post(
            f"{self.url}/start_profile",
            json=body,
            headers=self.admin,
            timeout=60,
            trust_env=False,
        ).raise_for_status()
        self.seconds([self.prompt(PROMPT)], 2 * steps)
        for _ in range(60):
            files = list(folder.rglob("*.json.gz"))
            if files and files[0].stat().st_size:
                time.sleep(1)  # it is being written
                return files[0]
            time.sleep(0.5)
        return None


def card_bytes() -> int | None:
    """Memory of the card in use; None without one, or if the driver does not tell."""
    gpu, _ = find_gpu()
    return gpu.used_bytes if gpu else None
