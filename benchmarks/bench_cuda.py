"""What a layer costs on a CUDA stream: replayed by a graph in two ways, called directly, and alone.

    python -m benchmarks.bench_cuda --threads 16 15 14
    python -m benchmarks.bench_cuda --real --json FILE

Tokens go through a chain of layers, with some matrix products of a GPU between them: replayed by
CUDA graphs whose calls are started by flags or by host functions (kt_kernel/stream.py), called
directly, and called on the CPU alone, which is the limit. The ways take turns. Between two passes
this thread keeps its CPU busy for half a millisecond, as SGLang's scheduler does.

With ``--real`` the layers are V3.2's, with random codes, and each call is routed to experts of its
own; without, they are small or have few experts, and all threads are tried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks import bench_prefill
from benchmarks.host_description import allowed_cpus, cpu_brand
from benchmarks.rehearsal import plan
from benchmarks.rehearsal.workspace import workspace
from deploy.launch.gpu_memory import V32_CONFIG
from kt_kernel import KTMoEWrapper, packed
from kt_kernel.gpu_prefill.start import THRESHOLD_VARIABLE
from kt_kernel.host.machine import survey
from kt_kernel.stream import stream_context

LAYERS = 3
#: name -> hidden size, intermediate size, experts, top-k: weights out of DRAM, and hardly any.
SIZES = {"7168 x 2048, 8 experts": (7168, 2048, 8, 8), "128 x 128, 2 experts": (128, 128, 2, 2)}
#: Rounds of all ways, the first of which does not count, and passes of a way in each.
ROUNDS, PASSES = 6, 40
SCHEDULER_SECONDS = 0.5e-3
GPU_PRODUCTS = 4
FLAGS, HOST_FUNCTIONS = "graph, flags", "graph, host functions"

Pass = Callable[[], object]


@dataclass(frozen=True)
class Figures:
    """Milliseconds a layer of all counted passes.

    Attributes:
        median: of all.
        low: the 10% quantile.
        high: the 90% quantile.
        rounds: the median of each round, which tells how far the machine drifted.
    """

    median: float
    low: float
    high: float
    rounds: list[float]


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


def capture(one_pass: Pass, flags: bool) -> torch.cuda.CUDAGraph:
    """A graph of the pass, whose calls are started by flags or by host functions.

    Raises:
        RuntimeError: flags do not work here.
    """
    context = stream_context()
    before = context.flags
    context.flags = flags
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_pass()
    finally:
        context.flags = before
    return graph


def measure(
    wrappers: Sequence[KTMoEWrapper],
    ids: Sequence[torch.Tensor],
    direct: bool = True,
    rounds: int = ROUNDS,
    passes: int = PASSES,
) -> dict[str, Figures]:
    """Way of calling -> figures; ``ids`` are those of each call, int32 [T, k] on the CPU."""
    tokens, top_k = ids[0].shape
    hidden = wrappers[0].hidden_size
    x, weights = torch.randn(tokens, hidden).to(torch.bfloat16), torch.rand(tokens, top_k)
    y_on_gpu, weights_on_gpu = x.cuda(), weights.cuda()
    ids_on_gpu = [one.cuda() for one in ids]
    matrix = (torch.randn(hidden, hidden) / hidden**0.5).to(torch.bfloat16).cuda()

    def pass_on_gpu() -> None:
        y = y_on_gpu
        for wrapper, one in zip(wrappers, ids_on_gpu, strict=True):
            for _ in range(GPU_PRODUCTS):
                y = y @ matrix
            stream = torch.cuda.current_stream().cuda_stream
            y = wrapper.forward(y, one, weights_on_gpu, stream)

    def pass_on_cpu() -> None:
        for wrapper, one in zip(wrappers, ids, strict=True):
            wrapper.forward(x, one, weights)

    pass_on_gpu()
    ways: dict[str, Pass] = {}
    if stream_context().flags:
        ways[FLAGS] = capture(pass_on_gpu, True).replay
    ways[HOST_FUNCTIONS] = capture(pass_on_gpu, False).replay
    if direct:
        ways["direct"] = pass_on_gpu
    ways["CPU alone"] = pass_on_cpu
    return take_turns(ways, len(wrappers), rounds, passes)


def take_turns(
    ways: Mapping[str, Pass], calls: int, rounds: int, passes: int
) -> dict[str, Figures]:
    """Figures of each way, for passes of so many calls."""
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(rounds):
        # In another order each time: what runs before leaves caches and clocks behind.
        names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in names:
            times[name].append([timed(ways[name]) * 1e3 / calls for _ in range(passes)])
    found = {}
    for name, each in times.items():
        counted = each[1:] if len(each) > 1 else each
        everything = [one for of_round in counted for one in of_round]
        deciles = quantiles(everything, n=10) if len(everything) > 1 else everything
        medians = [median(of_round) for of_round in counted]
        found[name] = Figures(median(everything), deciles[0], deciles[-1], medians)
    return found


def timed(one_pass: Pass) -> float:
    """Seconds of a pass."""
    started = time.perf_counter()
    one_pass()
    torch.cuda.current_stream().synchronize()
    ended = time.perf_counter()
    while time.perf_counter() < ended + SCHEDULER_SECONDS:
        pass
    return ended - started


def table_row(label: object, found: Mapping[str, Figures]) -> str:
    """Medians, and 90% in parentheses."""
    cells = (f"{one.median:.3f} ({one.high:.3f})" for one in found.values())
    return f"| {label} | {' | '.join(cells)} |"


def table_head(label: str, found: Mapping[str, Figures]) -> str:
    """The two lines above the rows."""
    return f"| {label} | {' | '.join(found)} |\n|---:|{'---:|' * len(found)}"


def measure_threads(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Small layers, and layers of few experts, by the number of threads."""
    rows = []
    for name, size in SIZES.items():
        top_k, experts = size[3], size[2]
        ids = [torch.arange(top_k, dtype=torch.int32)[None] % experts] * LAYERS
        for index, threads in enumerate(numbers):
            found = measure(layers(size, threads), ids)
            if index == 0:
                print("\n" + table_head(f"{name}: threads", found))
            print(table_row(threads, found), flush=True)
            rows.append({"size": name, "threads": threads, **as_json(found)})
    return rows


def measure_real(
    folder: Path, tokens: Sequence[int], chain: int, loaded: int, threads: int, method: str
) -> list[dict[str, Any]]:
    """V3.2's layers, in chains of so many calls over as many layers as are loaded."""
    os.environ[THRESHOLD_VARIABLE] = "none"  # registers memory, for calls that are none of these
    with workspace(folder) as made_in:
        made = bench_prefill.wrappers(made_in, method, loaded, threads)
    wrappers = [made[i % loaded] for i in range(chain)]
    rows: list[dict[str, Any]] = []
    for number in tokens:
        torch.manual_seed(number)
        experts, top_k = V32_CONFIG["n_routed_experts"], V32_CONFIG["num_experts_per_tok"]
        ids = [
            torch.randn(number, experts).topk(top_k).indices.to(torch.int32) for _ in range(chain)
        ]
        # Many tokens take tens of milliseconds a layer, and so less of them show as much.
        passes = min(PASSES, max(5, 2 * PASSES // number))
        found = measure(wrappers, ids, direct=False, passes=passes)
        if not rows:
            print("\n" + table_head(f"V3.2, {method}, {chain} calls: tokens", found))
        print(table_row(number, found), flush=True)
        rows.append({"tokens": number, "chain": chain, "threads": threads, **as_json(found)})
    return rows


def as_json(found: Mapping[str, Figures]) -> dict[str, Any]:
    """Figures by way."""
    return {"ms a layer": {name: vars(one) for name, one in found.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when measured, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_cuda", description=__doc__.splitlines()[0]
    )
    cpus = len(allowed_cpus())
    default = [n for n in (cpus, cpus - 1, cpus - 2, cpus - 4, cpus // 2) if n > 0]
    add = parser.add_argument
    add("--threads", type=int, nargs="+", help="of the workers; with --real the first")
    add("--real", action="store_true", help="layers of V3.2's size, 6 or 12 GB each")
    add("--tokens", type=int, nargs="+", default=[1, 8, 32], help="of a call, with --real")
    add("--chain", type=int, default=12, help="calls in a graph, with --real")
    add("--loaded", type=int, default=2, help="layers that they take turns with")
    add("--method", choices=packed.METHODS, default="int4")
    add("--folder", type=Path, default=plan.TMPFS, help="for the layers' files")
    add("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no NVIDIA GPU: expected one", file=sys.stderr)
        return 2
    torch.cuda.init()
    name = f"{torch.cuda.get_device_name()}; {cpu_brand()}, {cpus} CPUs"
    print(f"{name}; ms a layer (90%)")
    if args.real:
        threads = args.threads[0] if args.threads else survey().expert_threads(1)
        rows = measure_real(args.folder, args.tokens, args.chain, args.loaded, threads, args.method)
    else:
        rows = measure_threads(args.threads or default)
    if args.json:
        args.json.write_text(json.dumps({"machine": name, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
