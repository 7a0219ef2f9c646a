"""One server: started as users start it, asked, and ended."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.rehearsal import interference, soak, trace
from benchmarks.rehearsal.measures import Client, card_bytes
from benchmarks.server import Server
from deploy.launch.gpu_memory import V32_CONFIG
from kt_kernel.engine import TOTALS_VARIABLE

PROFILED_STEPS = 12
#: Decode steps that a time is the mean of, with up to FEW requests and with more.
STEPS, STEPS_OF_MANY, FEW = 64, 32, 4
#: Seconds that a start may take, and each layer's loading from a slow disk besides.
START_LIMIT, LOAD_LIMIT = 1200.0, 30.0
#: What SGLang says of the card's memory, and our wrapper of loading.
_MEMORY_LINE = re.compile(r"Load weight end|KV Cache is alloc|Memory pool end|CUDA graph end")
_LOAD_LINE = re.compile(r"layer \d+: \d+(?: of \d+)?, ([\d.]+) GB in ([\d.]+) s, ([\d.]+) GB/s")


@dataclass(frozen=True)
class Questions:
    """What a server is asked.

    Attributes:
        prompts: tokens of the prompts whose first token is waited for.
        requests: numbers of requests that decode together.
        rounds: of everything; prompts of over 4096 tokens are asked once.
        profile: whether to take a step apart.
        soak: minutes under load.
        interference: whether a long prompt comes in while others' answers run.
    """

    prompts: tuple[int, ...]
    requests: tuple[int, ...]
    rounds: int
    profile: bool
    soak: float = 0.0
    interference: bool = False


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def measure(
    layers: int, settings: Mapping[str, str], questions: Questions, folder: Path
) -> dict[str, Any]:
    """Serve ``layers`` MoE layers with these settings and ask; what was found, for JSON.

    Raises:
        RuntimeError: the server did not start, or ended; with the end of its log.
    """
    environment = {**settings, TOTALS_VARIABLE: str(totals_file(folder, layers))}
    before = card_bytes()
    limit = START_LIMIT + LOAD_LIMIT * layers
    server = Server(environment, folder / f"server-{layers}.log", start_limit=limit)
    with server:
        say(f"{layers} MoE layers: ready after {server.start_seconds:.0f} s")
        try:
            found = ask(server, layers, settings, questions, folder)
        except httpx.HTTPError as error:
            raise RuntimeError(f"the server does not answer ({error}):\n{server.tail()}") from None
        if before is None or found["card_bytes"] is None:
            found["card_bytes"] = None
        else:
            found["card_bytes"] -= before
        log = server.log.read_text(errors="replace")
    loads = _LOAD_LINE.findall(log)
    found["load GB/s"] = [float(rate) for _, _, rate in loads]
    found["load_seconds"] = sum(float(seconds) for _, seconds, _ in loads)
    found["log"] = [line.strip() for line in log.splitlines() if _MEMORY_LINE.search(line)]
    return found


def ask(
    server: Server, layers: int, settings: Mapping[str, str], questions: Questions, folder: Path
) -> dict[str, Any]:
    """All questions to a running server; what was found."""
    client = Client(
        f"http://127.0.0.1:{server.port}",
        layers,
        totals_file(folder, layers),
        admin=server.admin,
    )
    found: dict[str, Any] = {"layers": layers, "start_seconds": server.start_seconds}
    client.decode(1, 1, 16)  # what runs for the first time is compiled
    client.prefill(512, 1)
    found["decode"] = {}
    for requests in questions.requests:
        client.decode(requests, 1, 4)
        steps = STEPS if requests <= FEW else STEPS_OF_MANY
        one = client.decode(requests, questions.rounds, steps)
        one["uniform"] = uniform_experts(requests, int(settings["KT_NUM_GPU_EXPERTS"]))
        found["decode"][str(requests)] = one
        say(
            f"{layers} MoE layers, {requests} requests: a step takes "
            f"{min(one['seconds']) * 1e3:.2f} ms at best, a layer's call "
            f"{one['workers'] * 1e3:.2f} ms of the workers for {one['experts']:.1f} experts "
            f"({one['uniform']:.1f} if all were as likely)"
        )
    found["prefill"] = {}
    for tokens in questions.prompts:
        rounds = questions.rounds if tokens <= 4096 else 1
        if tokens <= 4096:
            client.prefill(tokens, 1)
        found["prefill"][str(tokens)] = times = client.prefill(tokens, rounds)
        say(f"{layers} MoE layers, a prompt of {tokens}: {min(times):.3f} s at best")
    if questions.interference:
        found["interference"] = beside = interference.measure(client)
        say(
            f"{layers} MoE layers, a prompt of {beside['prompt']} beside {beside['streams']} "
            f"answers: {beside['first_token']:.1f} s; their tokens take "
            f"{beside['alone'].get('p50', 0):.3f} s before, {beside['beside'].get('p50', 0):.3f} "
            f"(median) to {beside['beside'].get('most', 0):.3f} s meanwhile"
        )
    found["memory_bytes"] = server.memory_bytes()
    found["card_bytes"] = card_bytes()  # before the profiler takes some
    if questions.profile:
        found["step"] = profile(client, folder / "profile", layers)
    if questions.soak:
        say(f"{layers} MoE layers: {questions.soak:g} minutes under load")
        found["soak"] = soak.soak(server, client, questions.soak)
    return found


def totals_file(folder: Path, layers: int) -> Path:
    """Where the engine writes its totals."""
    return folder / f"totals-{layers}.json"


def uniform_experts(requests: int, resident: int) -> float:
    """CPU experts of a layer that so many tokens would use if all experts were as likely."""
    experts, top_k = V32_CONFIG["n_routed_experts"], V32_CONFIG["num_experts_per_tok"]
    return float((experts - resident) * (1 - (1 - top_k / experts) ** requests))


def profile(client: Client, folder: Path, layers: int) -> dict[str, Any] | None:
    """The parts of a decode step of one request; None where the profiler shows none."""
    path = client.profile(folder, PROFILED_STEPS)
    if path is None:
        say("the profiler wrote nothing: the parts of a step are not known")
        return None
    step = trace.analyse(trace.read(path), layers, 2 * V32_CONFIG["hidden_size"])
    if step is None:
        say("the profile shows no layer calls: the parts of a step are not known")
        return None
    return step.to_json()
