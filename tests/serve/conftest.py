"""One tiny checkpoint, its packed weights, and servers of them."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.server import REPOSITORY, Server
from examples.tiny.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(make_once: Callable[..., Path]) -> Path:
    """examples/tiny's checkpoint."""
    return make_once("serve/checkpoint", make_checkpoint)


@pytest.fixture(scope="session")
def packed_weights(checkpoint: Path, make_once: Callable[..., Path]) -> Callable[[str], Path]:
    """packed_weights("int4") converts the checkpoint once and returns the folder."""

    def convert(method: str) -> Path:
        return make_once(
            f"serve/{method}",
            lambda path: run(
                *("-m", "convert", "--input-path", str(checkpoint), "--input-type", "fp8"),
                *("--output", str(path), "--quant-method", method, "--no-merge-safetensor"),
            ),
        )

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


@pytest.fixture
def serve(
    server_settings: Callable[..., dict[str, str]], tmp_path: Path, measured: list[str]
) -> Iterator[Callable[..., Server]]:
    """serve(method, resident, target, **settings) is a running server, which ends with the test."""
    with ExitStack() as stack:

        def start(method: str, resident: int, target: str = "auto", **more: str) -> Server:
            settings = {**server_settings(method, resident, target), **more}
            server = stack.enter_context(Server(settings, tmp_path / "server.log"))
            measured.append(
                f"{method}, {resident} resident experts, target {target}: ready after "
                f"{server.start_seconds:.0f} s, {server.memory_bytes() / 2**30:.2f} GiB"
            )
            return server

        yield start


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
