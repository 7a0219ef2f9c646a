"""How fast ``convert`` packs weights: weights/s of one core, from FP8 in memory to packed bytes.

    python -m benchmarks.bench_quantize [--threads N] [--json FILE]

Beside it, in the same run: copying as many bytes as the source has, and INT4 with one scale for
each row as a few lines of PyTorch make it, from float, without packing. With ``--threads N`` that
many threads work at a time, each on a projection of its own, and the numbers are for each of them.
Time is the thread's CPU time, so that others who take the core away do not count.
The last column is how many cores keep up with a disk that reads 5 GB/s of FP8.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import stats
from benchmarks.host_description import describe
from benchmarks.markdown import table
from kt_kernel import _ext, packed

ROWS, COLUMNS = 2048, 7168  # one projection of V3.2
DISK_BYTES_PER_S = 5e9  # FP8 is a byte for each weight


def torch_per_row_int4(weights: torch.Tensor) -> torch.Tensor:
    scale = weights.abs().amax(1, keepdim=True) / 7
    return torch.round(weights / scale).to(torch.int8)


def weights_per_second(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return ROWS * COLUMNS / (time.thread_time() - start)


def measure(work: Callable[[], object], threads: int, rounds: int) -> list[float]:
    """Weights/s of each thread in each round."""
    rates: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            rates += pool.map(weights_per_second, [work] * threads)
    return rates[threads:]  # the first round builds tables and touches memory


def run(threads: int, rounds: int) -> dict[str, Any]:
    """Measure everything once: a JSON object of the machine and a row for each worker."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(5)
    weights = torch.from_numpy(rng.standard_normal((ROWS, COLUMNS), dtype=np.float32))
    bits = (weights * 64).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    scales = np.full((ROWS // 128, COLUMNS // 128), 1 / 64, np.float32)
    workers: dict[str, Callable[[], object]] = {
        method: partial(_ext.quantize_projection, bits, "fp8_e4m3", scales, method)
        for method in packed.METHODS
    }
    workers["memory copy"] = bits.copy
    workers["torch, per row, 4 bit"] = lambda: torch_per_row_int4(weights)
    rows = []
    for name, work in workers.items():
        rates = measure(work, threads, rounds)
        best, median = max(rates), stats.median(rates)
        rows.append(
            {
                "what": name,
                "best": best,
                "median": median,
                "spread": stats.spread(rates),
                "cores for the disk": math.ceil(DISK_BYTES_PER_S / best),
            }
        )
    return {"machine": describe(), "threads": threads, "rounds": rounds, "rows": rows}


def to_markdown(result: dict[str, Any]) -> str:
    head = ["", "M weights/s of a core, best", "median", "spread", "cores for 5 GB/s"]
    body = [
        [row["what"], f"{row['best'] / 1e6:.0f}", f"{row['median'] / 1e6:.0f}",
         f"{row['spread']:.0%}", str(row["cores for the disk"])]
        for row in result["rows"]
    ]  # fmt: skip
    return "\n".join(table(head, body))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the packer.")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    result = run(args.threads, args.rounds)
    print(to_markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
