"""The trained checkpoint's packed weights, what the CPU mode answers, and the table at the end."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quality.answers import Prompt, Result, ask
from benchmarks.quality.tiny import prompts as held_out
from benchmarks.server import REPOSITORY, Server
from tests.gpu.padded import write_padded

MODEL = "DeepSeek-V3.2"
QUESTIONS_PER_TASK = 10
ROWS: list[str] = []
"""The table's rows, one for each way of serving."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    name = torch.cuda.get_device_name()
    terminalreporter.section(f"the tiny model served on {name}, PyTorch {torch.__version__}")
    head = "| served | ready, s | right | as in CPU mode | KL, nats | tokens/s, 1 | tokens/s, 8 |"
    for line in (head, "|---|" + "---:|" * 6, *ROWS):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def rows() -> list[str]:
    return ROWS


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """The first held-out questions of each task."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in held_out():
        by_task.setdefault(prompt.task, []).append(prompt)
    return [p for asked in by_task.values() for p in asked[:QUESTIONS_PER_TASK]]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the trained checkpoint with INT4 experts; all else is the tutorial's."""
    folder = tmp_path_factory.mktemp("gpu")
    model, weights = folder / "model", folder / "int4"
    write_padded(model)
    command = [
        *(sys.executable, "-m", "convert", "--input-path", str(model), "--input-type", "fp8"),
        *("--output", str(weights), "--quant-method", "int4", "--no-merge-safetensor"),
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return {
        "KT_MODEL_PATH": str(model),
        "KT_WEIGHT_PATH": str(weights),
        "KT_CPUINFER": "auto",
        "KT_THREADPOOL_COUNT": "auto",
    }


@pytest.fixture(scope="session")
def on_cpu(
    settings: dict[str, str], prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """The CPU mode's answers and next-token distributions."""
    work = tmp_path_factory.mktemp("cpu-mode")
    environment = {**settings, "KT_DEVICE": "cpu", "KT_NUM_GPU_EXPERTS": "0"}
    with Server(environment, work / "server.log") as server:
        return ask_all(server, prompts, work)


def ask_all(server: Server, prompts: list[Prompt], work: Path) -> list[Result]:
    """Answers and scores of all prompts, several at a time."""
    return ask(f"http://127.0.0.1:{server.port}", MODEL, prompts, work / "answers.jsonl")
