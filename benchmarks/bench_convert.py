"""What a conversion takes: memory, time and disk, on one layer with V3.2's experts.

Writes a checkpoint of one layer (256 experts: 11.3 GB of FP8), converts it in a process of its own
and deletes everything again. The disk's own rates are measured in the same run; the page cache is
emptied of these files before each reading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.errors import BenchmarkError
from benchmarks.host_description import describe
from convert.source.checkpoint import INDEX_NAME
from convert.source.config import CONFIG_NAME
from kt_kernel.files.safetensors_header import TensorSpec, header_bytes
from kt_kernel.files.units import gigabytes
from kt_kernel.packed import METHODS

HIDDEN, INTERMEDIATE, BLOCK = 7168, 2048, 128
SHARD_EXPERTS = 32
CHUNK = 16 << 20
MATRICES = {
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
WEIGHTS = 3 * HIDDEN * INTERMEDIATE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        needed = int(args.experts * WEIGHTS * 2.1) + (1 << 30)
        if args.dir.exists():
            raise BenchmarkError(f"--dir {args.dir} exists: expected a name that is free")
        if shutil.disk_usage(args.dir.parent).free < needed:
            raise BenchmarkError(f"--dir {args.dir}: expected {gigabytes(needed)} of free space")
        args.dir.mkdir()
        try:
            result = _measure(args)
        finally:
            shutil.rmtree(args.dir, ignore_errors=True)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in result.items():
        print(f"{name:32} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_convert", description=__doc__)
    parser.add_argument("--experts", type=int, default=256, metavar="N", help="of the layer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--method", choices=METHODS, default="int4")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/bench-convert"), help="made anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    return parser


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    source = args.dir / "source"
    source.mkdir()
    seconds = _generate(source, args.experts)
    shards = sorted(source.glob("*.safetensors"))
    source_bytes = sum(shard.stat().st_size for shard in shards)
    read_rate = _read_rate(shards[0])
    _drop_caches(shards)
    report = args.dir / "report.json"
    argv = [
        *(sys.executable, "-m", "convert", "--input-path", str(source)),
        *("--output", str(args.dir / "out"), "--quant-method", args.method),
        *("--cpuinfer-threads", str(args.threads), "--report", str(report)),
    ]
    started = time.monotonic()
    memory, usage = _watch(argv)
    wall = time.monotonic() - started
    said = json.loads(report.read_bytes())
    layer_seconds = said["this_run"]["seconds"]
    weights = args.experts * WEIGHTS
    return {
        **describe(),
        "experts": args.experts,
        "method": args.method,
        "threads": args.threads,
        "disk write GB/s": round(source_bytes / seconds / 1e9, 3),
        "disk read GB/s": round(read_rate, 3),
        "layer seconds": layer_seconds,
        "process seconds": round(wall, 2),
        "CPU seconds": round(usage, 2),
        "M weights/s": round(weights / layer_seconds / 1e6, 1),
        "M weights/s/thread": round(weights / layer_seconds / args.threads / 1e6, 1),
        "M weights/CPU second": round(weights / usage / 1e6, 1),
        "read GB/s": round(source_bytes / layer_seconds / 1e9, 3),
        "written GB/s": round(said["bytes"] / layer_seconds / 1e9, 3),
        "peak RSS MiB": round(memory["VmHWM"] / 1024),
        "peak anonymous MiB": round(memory["RssAnon"] / 1024),
        "peak file MiB": round(memory["RssFile"] / 1024),
    }


def _generate(folder: Path, experts: int) -> float:
    """Write the checkpoint; the seconds of its writes and flushes, without making the values."""
    import torch

    values = torch.randn(BLOCK * 4, HIDDEN, generator=torch.Generator().manual_seed(0)) * 100
    base = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().ravel()
    rng = np.random.default_rng(0)
    config = {
        "model_type": "deepseek_v32",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": experts,
        "num_hidden_layers": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    seconds = 0.0
    for first in range(0, experts, SHARD_EXPERTS):
        shard = f"model-{first:05d}.safetensors"
        tensors: dict[str, TensorSpec] = {}
        for expert in range(first, min(first + SHARD_EXPERTS, experts)):
            for projection, (n, k) in MATRICES.items():
                name = f"model.layers.0.mlp.experts.{expert}.{projection}_proj.weight"
                tensors[name] = TensorSpec("F8_E4M3", (n, k))
                tensors[f"{name}_scale_inv"] = TensorSpec("F32", (n // BLOCK, k // BLOCK))
        weight_map |= dict.fromkeys(tensors, shard)
        with (folder / shard).open("wb", buffering=0) as file:
            for data in (header_bytes(tensors, {}), *_contents(tensors, base, rng)):
                started = time.monotonic()
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                seconds += time.monotonic() - started
            started = time.monotonic()
            os.fsync(file.fileno())
            seconds += time.monotonic() - started
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return seconds


def _contents(
    tensors: dict[str, TensorSpec],
    base: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[bytes]:
    """The same random rows from another place on, with other scales: no two matrices are equal."""
    for spec in tensors.values():
        if spec.dtype == "F32":
            yield rng.uniform(1e-4, 3e-4, spec.nbytes // 4).astype(np.float32).tobytes()
        else:
            shifted = np.roll(base, int(rng.integers(base.size)))
            yield np.resize(shifted, spec.nbytes).tobytes()


def _drop_caches(paths: Sequence[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _read_rate(path: Path) -> float:
    """GB/s of reading a file from the disk, from its beginning to its end."""
    _drop_caches([path])
    buffer = bytearray(CHUNK)
    started, total = time.monotonic(), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.monotonic() - started) / 1e9


def _watch(argv: Sequence[str]) -> tuple[dict[str, int], float]:
    """Run a command; the peaks of its memory in KiB, and its CPU seconds.

    Raises:
        BenchmarkError: it failed.
    """
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]))
            time.sleep(0.02)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchmarkError(f"the conversion ended with {process.returncode}")
    return peaks, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
