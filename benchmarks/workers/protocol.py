"""What every worker process has in common: the layer's shape, its inputs, and the line protocol.

A worker is a script that the benchmark starts with one JSON argument, the ``Job``. It loads its
engine, then answers one JSON line on standard output for each line on standard input:

    {"ready": {...}} or {"unavailable": reason}      once, after loading
    {"check": FILE}                    -> {"error": mean|out - expected| / mean|expected|}
    {"time": TOKENS, "seed": S, "seconds": T, "calls": N}
                                       -> {"ms": [...], "experts": [distinct experts, ...]}

The scripts are run by path and import nothing of the project but this file, so that a baseline's
process holds only the baseline.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8
#: Weights of one expert: gate, up and down.
EXPERT_WEIGHTS = 3 * HIDDEN * INTERMEDIATE
PROJECTIONS = ("gate", "up", "down")

Floats = NDArray[np.float32]
Bf16 = NDArray[np.uint16]


class Unavailable(Exception):
    """This engine does not run here; the message says why."""


@dataclass(frozen=True)
class Job:
    """What a worker is told when it starts.

    Args:
        method: the engine's name for the format of the weights.
        threads: compute threads.
        experts: experts of the layer.
        max_tokens: tokens of the largest call.
        sources: folder of ``gate.npy``, ``up.npy`` and ``down.npy``, bf16 bits [S, N, K]. Expert
            ``e`` is a copy of source ``e % S``: speed does not depend on the values, and drawing
            and quantising all experts would take most of the benchmark's time.
        baseline: folder of the baseline's files, empty for our own engine.
    """

    method: str
    threads: int
    experts: int
    max_tokens: int
    sources: str
    baseline: str = ""

    def source(self, projection: str) -> Bf16:
        """bf16 bits [S, N, K] of one projection, mapped from the file."""
        bits: Bf16 = np.load(Path(self.sources) / f"{projection}.npy", mmap_mode="r")
        return bits

    @property
    def num_sources(self) -> int:
        return len(self.source("gate"))

    def source_floats(self, projection: str, index: int) -> Floats:
        """float [N, K] of one source expert's projection."""
        return from_bf16(self.source(projection)[index])


@dataclass(frozen=True)
class Call:
    """One call of a layer: ``run`` is what is timed, ``result`` [T, H] is read after it."""

    run: Callable[[], object]
    result: Callable[[], Floats]


class Engine(Protocol):
    """A loaded layer."""

    def describe(self) -> dict[str, Any]:
        """``version``, ``runs_on`` (what was chosen for this CPU) and ``bits`` of a weight."""

    def bind(self, x: Bf16, ids: NDArray[np.int64], weights: Floats) -> Call:
        """A call with the inputs [T, H], [T, k] and [T, k]; conversions happen here, untimed."""


def to_bf16(values: Floats) -> Bf16:
    """Round to nearest even."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Bf16) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def choose_experts(
    rng: np.random.Generator, tokens: int, experts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[tokens, TOP_K] ids: distinct ones of ``experts`` for each token."""
    order = rng.random((tokens, len(experts))).argsort(axis=1)[:, :TOP_K]
    ids: NDArray[np.int64] = experts[order]
    return ids


def relative_error(output: Floats, expected: Floats) -> float:
    """mean|output - expected| / mean|expected|; infinite if ``output`` is not finite."""
    if not np.isfinite(output).all():
        return float("inf")
    return float(np.abs(output - expected).mean() / np.abs(expected).mean())


def serve(load: Callable[[Job], Engine]) -> None:
    """Load the engine of the job in ``sys.argv`` and answer until standard input ends."""
    # A stopped process sees no end of input: the kernel has to end it with the benchmark.
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    job = Job(**json.loads(sys.argv[1]))
    try:
        engine = load(job)
    except Unavailable as reason:
        answer({"unavailable": str(reason)})
        return
    answer({"ready": engine.describe()})
    for line in sys.stdin:
        request = json.loads(line)
        answer(_check(engine, request) if "check" in request else _time(engine, job, request))


def _check(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    with np.load(request["check"]) as data:
        call = engine.bind(data["x"], data["ids"], data["weights"])
        call.run()
        return {"error": relative_error(call.result(), data["expected"])}


def _time(engine: Engine, job: Job, request: dict[str, Any]) -> dict[str, Any]:
    tokens = request["time"]
    rng = np.random.default_rng(request["seed"])
    x = to_bf16(rng.standard_normal((tokens, HIDDEN), dtype=np.float32))
    everyone = np.arange(job.experts)
    milliseconds: list[float] = []
    distinct: list[int] = []
    end = time.perf_counter() + request["seconds"]
    while not milliseconds or (len(milliseconds) < request["calls"] and time.perf_counter() < end):
        ids = choose_experts(rng, tokens, everyone)
        call = engine.bind(x, ids, rng.random((tokens, TOP_K), dtype=np.float32))
        before = time.perf_counter()
        call.run()
        milliseconds.append((time.perf_counter() - before) * 1e3)
        distinct.append(len(np.unique(ids)))
    return {"ms": milliseconds, "experts": distinct}
