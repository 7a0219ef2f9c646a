"""Stock SGLang on an NVIDIA GPU with the experts on the CPUs answers what the CPU mode answers.

``make gpu-test`` runs this, on any machine with a card, and prints a table of what it saw.
"""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.quality.answers import Prompt, Result
from benchmarks.quality.compare import summary
from benchmarks.server import Server
from tests.gpu.conftest import ask_all

pytestmark = [pytest.mark.serve, pytest.mark.gpu]

TIMED_TOKENS = 128
PROMPT = list(range(10, 42))
SAME_ANSWERS = 0.95
"""Of all, at least, where other experts have another number format."""

#: SGLang 0.5.16 captures no prefill of a model with MLA unless told; it is 0.5.23's own choice.
PREFILL_BACKEND = "--cuda-graph-backend-prefill breakable"


@dataclass(frozen=True)
class Case:
    """One way of serving: resident experts of each MoE layer, which phases have graphs, and GPUs
    that share the model."""

    resident: int
    decode_graph: bool
    prefill_graph: bool = False
    gpus: int = 1

    def __str__(self) -> str:
        phases = {"decode": self.decode_graph, "prefill": self.prefill_graph}
        graphs = " and ".join(phase for phase, captured in phases.items() if captured)
        gpus = "" if self.gpus == 1 else f", {self.gpus} GPUs"
        return f"{self.resident} resident experts, graphs: {graphs or 'none'}{gpus}"

    @property
    def settings(self) -> dict[str, str]:
        extra = [PREFILL_BACKEND] if self.prefill_graph else []
        return {
            "KT_EXTRA_ARGS": " ".join([os.environ.get("KT_EXTRA_ARGS", ""), *extra]),
            "KT_NUM_GPU_EXPERTS": str(self.resident),
            "KT_DECODE_CUDA_GRAPH": str(int(self.decode_graph)),
            "KT_PREFILL_CUDA_GRAPH": str(int(self.prefill_graph)),
            "KT_TENSOR_PARALLEL_SIZE": str(self.gpus),
        }


CASES = [
    Case(1, True),
    Case(0, True),
    Case(4, True),
    Case(0, False),
    Case(1, True, True),
    Case(1, True, gpus=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_are_those_of_the_cpu_mode(
    case: Case,
    settings: dict[str, str],
    prompts: list[Prompt],
    on_cpu: list[Result],
    rows: list[str],
    tmp_path: Path,
) -> None:
    if torch.cuda.device_count() < case.gpus:
        pytest.skip(f"needs {case.gpus} GPUs")
    with Server({**settings, **case.settings}, tmp_path / "server.log") as server:
        answers = ask_all(server, prompts, tmp_path)
        speed = [tokens_per_second(server, requests) for requests in (1, 8)]
        log = server.log.read_text(errors="replace")
    found = summary(on_cpu, answers)
    rows.append(
        f"| {case} | {server.start_seconds:.0f} | {found['accuracy']:.1%} | "
        f"{found['same answers']:.1%} | {found['KL']:.1e} | {speed[0]:.0f} | {speed[1]:.0f} |"
    )
    different = [
        (a.prompt.question, a.text, b.text)
        for a, b in zip(on_cpu, answers, strict=True)
        if a.text != b.text
    ]
    assert not different
    assert "self-test of layer 1: " in log
    assert replayed(log, "Decode") == {case.decode_graph}
    prefills = replayed(log, "Prefill")
    # A prompt that begins like one before is not replayed: the graphs have no cached prefix.
    assert True in prefills if case.prefill_graph else prefills == {False}


def test_the_most_used_experts_on_the_card(
    settings: dict[str, str], prompts: list[Prompt], tmp_path: Path
) -> None:
    """A server counts; the next one moves its most used experts there, and answers as well.

    Not to the letter: the experts that move are computed with the checkpoint's FP8 weights instead
    of INT4 ones, and those that leave the other way round, so that a near tie of two tokens may
    turn. Experts in a wrong order would leave few answers the same.
    """
    counted = {**settings, "KT_NUM_GPU_EXPERTS": "4", "KT_EXPERT_COUNTS": str(tmp_path / "counts")}
    with Server(counted, tmp_path / "first.log") as server:
        first = ask_all(server, prompts, tmp_path)
    measured = {**counted, "KT_EXPERT_PLACEMENT": "measured"}
    (tmp_path / "measured").mkdir()
    with Server(measured, tmp_path / "measured.log") as server:
        then = ask_all(server, prompts, tmp_path / "measured")
        log = server.log.read_text(errors="replace")
    found = re.search(
        r"4 most used experts of each layer, which took ([\d.]+)% .* took ([\d.]+)%", log
    )
    assert found is not None, log
    print(f"share of the pairs on the card: {found[1]}%, of experts 0 to 3 {found[2]}%")
    assert float(found[1]) > float(found[2])
    compared = summary(first, then)
    different = [
        (a.prompt.question, a.text, b.text)
        for a, b in zip(first, then, strict=True)
        if a.text != b.text
    ]
    assert compared["same answers"] >= SAME_ANSWERS, different
    assert compared["accuracy"] >= summary(first, first)["accuracy"], different


def replayed(log: str, phase: str) -> set[bool]:
    """Whether SGLang replayed a CUDA graph, of all the batches of this phase that it logged."""
    return {said == "True" for said in re.findall(rf"{phase} batch.* cuda graph: (\w+)", log)}


def tokens_per_second(server: Server, requests: int) -> float:
    """Greedy tokens of so many requests at a time, the second time they are asked."""
    with ThreadPoolExecutor(requests) as clients:
        for _ in range(2):
            started = time.perf_counter()
            list(clients.map(lambda _: server.generate(PROMPT, TIMED_TOKENS), range(requests)))
            seconds = time.perf_counter() - started
    return requests * TIMED_TOKENS / seconds
