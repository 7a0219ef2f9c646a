"""One tiny checkpoint, its packed weights, and servers of them, one at a time."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.serve.server import REPOSITORY, Server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/tiny's checkpoint."""
    path = tmp_path_factory.mktemp("serve") / "checkpoint"
    run("-m", "examples.tiny.make_checkpoint", "--output", str(path))
    return path


@pytest.fixture(scope="session")
def packed_weights(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """packed_weights("int4") converts the checkpoint once and returns the folder."""

    @cache
    def convert(method: str) -> Path:
        path = tmp_path_factory.mktemp("weights") / method
        run(
            *("-m", "convert", "--input-path", str(checkpoint), "--input-type", "fp8"),
            *("--output", str(path), "--quant-method", method, "--no-merge-safetensor"),
        )
        return path

    return convert


@pytest.fixture(scope="session")
def server_settings(
    checkpoint: Path, packed_weights: Callable[[str], Path]
) -> Callable[..., dict[str, str]]:
    """Settings of a float32 server of ``method`` with ``resident`` experts a layer."""

    def settings(method: str, resident: int, target: str = "auto") -> dict[str, str]:
        return {
            "KT_DEVICE": "cpu",
            "KT_MODEL_PATH": str(checkpoint),
            "KT_WEIGHT_PATH": str(packed_weights(method)),
            "KT_METHOD": f"AMX{method.upper()}",
            "KT_NUM_GPU_EXPERTS": str(resident),
            "KT_CPUINFER": "2",
            "KT_THREADPOOL_COUNT": "1",
            "KT_TARGET": target,
            # bf16 would flip near-ties of the router, on both sides differently. An idle
            # scheduler otherwise keeps one core busy, which transformers needs.
            "KT_EXTRA_ARGS": "--dtype float32 --sleep-on-idle",
        }

    return settings


@pytest.fixture(scope="module")
def serve(
    server_settings: Callable[..., dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
    measured: list[str],
) -> Iterator[Callable[..., Server]]:
    """serve(method, resident, target) returns a running server and stops the one before it."""
    running: dict[tuple[str, int, str], Server] = {}

    def start(method: str, resident: int, target: str = "auto") -> Server:
        key = (method, resident, target)
        if key not in running:
            stop()
            log = tmp_path_factory.mktemp("server") / "server.log"
            running[key] = Server(server_settings(*key), log).__enter__()
            measured.append(
                f"{method}, {resident} resident experts, target {target}: ready after "
                f"{running[key].start_seconds:.0f} s, "
                f"{running[key].memory_bytes() / 2**30:.2f} GiB"
            )
        return running[key]

    def stop() -> None:
        for server in running.values():
            server.stop()
        running.clear()

    yield start
    stop()


@pytest.fixture(scope="session")
def prompts(checkpoint: Path) -> list[list[int]]:
    """Random tokens, from one token to more than any kernel's batch; seeded."""
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    source = random.Random(20)
    return [[source.randrange(vocabulary) for _ in range(length)] for length in (1, 5, 33, 70, 300)]


def run(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
