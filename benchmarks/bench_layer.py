"""Time one MoE layer of V3.2's shape beside what this machine's memory can deliver.

    python -m benchmarks.bench_layer [--threads N] [--experts 32] [--json FILE]

The packed weights are random codes (speed does not depend on their values), larger than any cache;
each call routes its tokens to distinct experts anew. Reported: the median time of a call, the bytes
of weights it has to read over that time as a share of the read bandwidth measured in the same run,
and the arithmetic rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kt_kernel import KTMoEWrapper, _ext, packed
from kt_kernel.engine import target_name

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8


def write_random_layer(folder: Path, layout: packed.PackedLayout) -> None:
    """A layer file of valid, random contents."""
    rng = np.random.default_rng(0)
    entries, begin = {}, 0
    for name, spec in layout.tensors().items():
        span = [begin, begin + spec.nbytes]
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
        begin += spec.nbytes
    header = json.dumps({"__metadata__": layout.metadata(0), **entries}).encode()
    with (folder / packed.layer_file_name(0)).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, spec in layout.tensors().items():
            if name == "tables":
                file.write(_ext.int4_tables().tobytes())
            elif name.endswith("scales"):
                file.write(np.full(spec.shape, 0x38D2, np.uint16).tobytes())  # bf16 of 1e-4
            else:
                file.write(rng.bytes(spec.nbytes))


def median_seconds(call: Callable[[], object], budget: float) -> float:
    """Median of repeated calls after one warm-up, for about ``budget`` seconds."""
    call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < budget:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def read_bandwidth(threads: int) -> float:
    """GB/s of summing 1 GiB with torch: every byte is read once, almost nothing is computed."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.int64)
    return data.numel() * 8 / median_seconds(data.sum, 1.0) / 1e9


def bench(method: str, threads: int, experts: int, budget: float) -> list[dict[str, float | str]]:
    layout = packed.PackedLayout(experts, HIDDEN, INTERMEDIATE, packed.KT_METHODS[method])
    with tempfile.TemporaryDirectory() as folder:
        write_random_layer(Path(folder), layout)
        wrapper = KTMoEWrapper(
            layer_idx=0,
            num_experts=experts,
            num_experts_per_tok=TOP_K,
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            num_gpu_experts=0,
            cpuinfer_threads=threads,
            threadpool_count=1,
            weight_path=folder,
            method=method,
        )
        wrapper.load_weights(torch.arange(experts))
    rows: list[dict[str, float | str]] = []
    for tokens in (1, 8, 32, 128, 512):
        x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
        weights = torch.rand(tokens, TOP_K)
        read: list[int] = []

        def call(x: torch.Tensor = x, weights: torch.Tensor = weights, read: list[int] = read):
            ids = torch.rand(len(x), experts).topk(TOP_K).indices.int()
            read.append(len(ids.unique()))
            wrapper.forward(x, ids, weights, 0)

        seconds = median_seconds(call, budget)
        per_expert = layout.bits_per_weight() / 8 * 3 * HIDDEN * INTERMEDIATE
        operations = 2 * 3 * HIDDEN * INTERMEDIATE * TOP_K * tokens
        rows.append(
            {
                "method": method,
                "tokens": tokens,
                "ms": seconds * 1e3,
                "weights GB/s": statistics.median(read) * per_expert / seconds / 1e9,
                "GOP/s": operations / seconds / 1e9,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(_ext.allowed_cpus()))
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth = read_bandwidth(args.threads)
    print(f"{_ext.cpu_brand()}, {args.threads} threads, target {target_name()}")
    print(f"read bandwidth {bandwidth:.1f} GB/s; {args.experts} experts, top-{TOP_K}")
    print(f"{'method':<9}{'tokens':>7}{'ms':>10}{'GB/s':>8}{'of limit':>10}{'GOP/s':>8}")
    rows = []
    for method in packed.KT_METHODS:
        for row in bench(method, args.threads, args.experts, args.seconds):
            rows.append(row)
            rate = float(row["weights GB/s"])
            print(
                f"{row['method']:<9}{row['tokens']:>7}{row['ms']:>10.2f}{rate:>8.1f}"
                f"{rate / bandwidth:>10.0%}{row['GOP/s']:>8.0f}"
            )
    if args.json:
        result = {"cpu": _ext.cpu_brand(), "threads": args.threads, "target": target_name()}
        args.json.write_text(json.dumps(result | {"read GB/s": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
