"""Run ``entrypoint.py`` as a user does: a process of its own with a chosen environment."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pwd
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from examples.tiny.hub import Hub, HubOptions
from kt_kernel.host.gpus import Gpu
from kt_kernel.host.machine import Machine

REPOSITORY = Path(__file__).parents[2]
ENTRYPOINT = REPOSITORY / "entrypoint.py"
REPO_ID = "lab/small"
#: The stages of tests leave the state of a server that runs on this machine alone.
RUN_DIR = tempfile.TemporaryDirectory(prefix="kt-kernel-tests-")

LAPTOP = Machine(cpus=8, cores=4, numa_nodes=1, cpu_quota=None, gpu=None)
L20 = Gpu("NVIDIA L20", 48 * 2**30, (8, 9), (12, 8))
H200 = Gpu("NVIDIA H200", 141 * 2**30, (9, 0), (13, 0))


def with_gpu(gpu: Gpu) -> Machine:
    """A server with two NUMA nodes of 32 cores and this card."""
    return Machine(cpus=128, cores=64, numa_nodes=2, cpu_quota=None, gpu=gpu)


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's variables without any setting, and the given ones."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KT_", "HF_", "SGLANG_", "CUDA_", "PYTORCH_"))
        and not name.upper().endswith("_PROXY")
    }
    ours = {"HF_HUB_DISABLE_TELEMETRY": "1", "KT_RUN_DIR": RUN_DIR.name}
    return {**kept, **ours, **settings}


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process's user one without a home, as many containers' are."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def command(*words: str | Path) -> list[str]:
    """The command line of a stage."""
    return [sys.executable, str(ENTRYPOINT), *map(str, words)]


def run(*words: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a stage to its end."""
    return subprocess.run(
        command(*words),
        env=clean_environment(**settings),
        cwd="/",
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


def fails(*words: str | Path, **settings: str) -> str:
    """Run a stage that must end with exit code 2 and one line ``error: ...``; returns the line."""
    result = run(*words, **settings)
    assert result.returncode == 2, result
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


def safetensors_file(seed: int, nbytes: int) -> bytes:
    """A sound safetensors file with one tensor of random bytes."""
    header = json.dumps(
        {f"t{seed}": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    blocks = (hashlib.sha512(f"{seed} {i}".encode()).digest() for i in range(-(-nbytes // 64)))
    return struct.pack("<Q", len(header)) + header + b"".join(blocks)[:nbytes]


def write_repository(folder: Path, shards: int = 4, shard_bytes: int = 300_000) -> list[str]:
    """A model repository with everything that a real one has; returns the needed files' names."""
    folder.mkdir(parents=True)
    names = [f"model-{i + 1:05d}-of-{shards:06d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(safetensors_file(i, shard_bytes))
    weight_map = {f"t{i}": name for i, name in enumerate(names)}
    needed = {
        "config.json": '{"model_type": "deepseek_v32"}',
        "generation_config.json": "{}",
        "tokenizer.json": '{"model": {}}' * 500,
        "tokenizer_config.json": "{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}),
        "README.md": "# A model\n",
        "LICENSE": "MIT\n",
    }
    others = {
        ".gitattributes": "*.safetensors filter=lfs\n",
        "assets/picture.png": "not needed",
        "inference/generate.py": "not needed",
        "original/consolidated.safetensors": "the same weights again",
        "pytorch_model.bin": "the same weights again",
        "consolidated.safetensors": "the same weights again",
    }
    for name, text in {**needed, **others}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return sorted([*needed, *names])


def content(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory, without the Hub client's own notes."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != ".cache"
    }


def fetched(log_lines: Sequence[str]) -> Mapping[str, int]:
    """Number of GETs of each file in a hub's log."""
    counts: dict[str, int] = {}
    for line in log_lines:
        method, path, *_ = line.split()
        if method == "GET" and "/resolve/" in path:
            name = path.split("/resolve/")[1].partition("/")[2]
            counts[name] = counts.get(name, 0) + 1
    return counts


@dataclass
class LocalHub:
    """A running hub with one repository.

    Attributes:
        endpoint: for HF_ENDPOINT.
        folder: the repository's files; changing one makes a new revision.
        needed: names of the files that a download must fetch.
        options: what the hub refuses and breaks; may be changed while it runs.
    """

    endpoint: str
    folder: Path
    needed: list[str]
    options: HubOptions
    log: io.StringIO
    hub: Hub

    def log_lines(self) -> list[str]:
        """Requests so far: method, path, status, body bytes."""
        return self.log.getvalue().splitlines()

    def forget(self) -> None:
        """Empty the log, once the requests of a killed client are in it too."""
        deadline = time.monotonic() + 30
        while not self.hub.is_idle():
            assert time.monotonic() < deadline, "the hub still answers a client that is gone"
            time.sleep(0.02)
        self.log.seek(0)
        self.log.truncate()

    @property
    def revision(self) -> str:
        """Commit of the branch main."""
        return self.hub.repositories.snapshot(REPO_ID).revision

    def settings(self, directory: Path, **more: str) -> dict[str, str]:
        """Settings of a download from here."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(directory.parent / "hf-home"),
            "KT_MODEL_ID": REPO_ID,
            "KT_MODEL_PATH": str(directory),
            **more,
        }


@dataclass(frozen=True)
class Prepared:
    """A tiny model and its weights as the stages make them; never changed."""

    model: Path
    int4: Path
    int8: Path
