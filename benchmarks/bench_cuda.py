"""What a layer costs on a CUDA stream, by the number of worker threads.

    python -m benchmarks.bench_cuda --threads 16 15 14

One token goes through three layers, with some matrix products of a GPU between them, in three ways:
replayed by a CUDA graph, called directly, and called on the CPU alone, which is the limit. Between
two tokens this thread keeps its CPU busy for half a millisecond, as SGLang's scheduler does.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch

from benchmarks.host_description import allowed_cpus, cpu_brand
from kt_kernel import KTMoEWrapper

LAYERS = 3
#: name -> hidden size, intermediate size, experts, top-k: weights out of DRAM, and hardly any.
SIZES = {"7168 x 2048, 8 experts": (7168, 2048, 8, 8), "128 x 128, 2 experts": (128, 128, 2, 2)}
TOKENS, WARM_UP = 250, 50
SCHEDULER_SECONDS = 0.5e-3
GPU_PRODUCTS = 4


def layers(size: tuple[int, int, int, int], threads: int) -> list[KTMoEWrapper]:
    """INT4 layers; all experts have the same random weights."""
    hidden, intermediate, experts, top_k = size
    torch.manual_seed(1)

    def drawn(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k) / math.sqrt(k)).to(torch.bfloat16).expand(experts, n, k)

    weights = drawn(intermediate, hidden), drawn(intermediate, hidden), drawn(hidden, intermediate)
    made = []
    for layer_idx in range(LAYERS):
        wrapper = KTMoEWrapper(
            layer_idx,
            experts,
            top_k,
            hidden,
            intermediate,
            num_gpu_experts=0,
            cpuinfer_threads=threads,
            method="AMXINT4",
        )
        wrapper.load_weights_from_tensors(*weights, torch.arange(experts))
        made.append(wrapper)
    return made


def measure(size: tuple[int, int, int, int], threads: int) -> dict[str, tuple[float, float]]:
    """Way of calling -> milliseconds a layer, median and 90%."""
    hidden, _, experts, top_k = size
    wrappers = layers(size, threads)
    ids = torch.arange(top_k, dtype=torch.int32)[None] % experts
    x, weights = torch.randn(1, hidden).to(torch.bfloat16), torch.rand(1, top_k)
    on_gpu = x.cuda(), ids.cuda(), weights.cuda()
    matrix = (torch.randn(hidden, hidden) / hidden**0.5).to(torch.bfloat16).cuda()

    def pass_on_gpu() -> None:
        y = on_gpu[0]
        for wrapper in wrappers:
            for _ in range(GPU_PRODUCTS):
                y = y @ matrix
            y = wrapper.forward(y, *on_gpu[1:], torch.cuda.current_stream().cuda_stream)

    def pass_on_cpu() -> None:
        for wrapper in wrappers:
            wrapper.forward(x, ids, weights)

    pass_on_gpu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pass_on_gpu()
    ways = {"graph": graph.replay, "direct": pass_on_gpu, "CPU alone": pass_on_cpu}
    return {name: timed(way) for name, way in ways.items()}


def timed(one_pass: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds a layer of a pass, median and 90%."""
    times = []
    for _ in range(TOKENS):
        started = time.perf_counter()
        one_pass()
        torch.cuda.current_stream().synchronize()
        ended = time.perf_counter()
        times.append((ended - started) * 1e3 / LAYERS)
        while time.perf_counter() < ended + SCHEDULER_SECONDS:
            pass
    return median(times[WARM_UP:]), quantiles(times[WARM_UP:], n=10)[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when measured, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_cuda", description=__doc__.splitlines()[0]
    )
    cpus = len(allowed_cpus())
    default = [n for n in (cpus, cpus - 1, cpus - 2, cpus - 4, cpus // 2) if n > 0]
    parser.add_argument("--threads", type=int, nargs="+", default=default)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no NVIDIA GPU: expected one", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}; {cpu_brand()}, {cpus} CPUs; ms a layer (90%)")
    for name, size in SIZES.items():
        print(f"\n| {name}: threads | graph | direct | CPU alone |\n|---:|---:|---:|---:|")
        for threads in args.threads:
            found = measure(size, threads)
            cells = (f"{middle:.3f} ({high:.3f})" for middle, high in found.values())
            print(f"| {threads} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
