"""What the routed experts of a prompt take on other hosts, by the formula that divides them.

    python -m benchmarks.prefill_on_paper

Nothing is measured. An expert on the card costs its way over the bus; one on the CPUs its bytes and
its tokens (``kt_kernel.gpu_prefill.costs``). The first row is the host that
``benchmarks.bench_prefill`` measured, with the costs that it learned, so that the formula can be
held against measured figures. Attention is not in it, nor what neither side computes.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.rehearsal import plan
from benchmarks.rehearsal.sizes import MOE_LAYERS
from deploy.launch.gpu_memory import V32_CONFIG
from kt_kernel.gpu_prefill.costs import Costs

RESIDENT = 1
TOKENS = (512, 4096)


class Cpus(NamedTuple):
    """Name, bytes a second that they read, and seconds of a token of an expert."""

    name: str
    reads: float
    pair: float


#: Learned by bench_prefill on 2026-11-30, on 14 threads of 8 cores.
MEASURED = Cpus("8 cores of Emerald Rapids", 110e9, 9.96e-6)
#: As many pairs a core; 16 channels of DDR5-4800 at three quarters of their rate.
TWO_8488C = Cpus("2 x 8488C, 96 cores", 460e9, MEASURED.pair * 8 / 96)
#: Cards, and bytes a second from pinned memory over their 16 lanes; PCIe 4 at half.
BUSES = {"H200, RTX 5090, RTX PRO 6000 (PCIe 5)": 54e9, "L20, RTX 4090 (PCIe 4)": 27e9}


def tokens_of_experts(tokens: int) -> NDArray[np.int64]:
    """int64 [E], routed as bench_prefill's calls are: some experts get several times as many."""
    experts, top_k = V32_CONFIG["n_routed_experts"], V32_CONFIG["num_experts_per_tok"]
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((tokens, experts)) + 0.5 * generator.standard_normal(experts)
    ids = np.argpartition(-scores, top_k)[:, :top_k]
    return np.bincount(ids.ravel(), minlength=experts)


def layer_seconds(bus: float, cpus: Cpus, counts: NDArray[np.int64]) -> tuple[float, int]:
    """Of one layer's experts, and how many of them go to the card."""
    layout = plan.v32_layout("int4")
    size = 3 * layout.hidden_size * layout.intermediate_size * layout.bits_per_weight() / 8
    costs = Costs(size / bus, size / cpus.reads, cpus.pair)
    may_stream = np.arange(len(counts)) >= RESIDENT
    chosen = costs.choose(counts, may_stream, [])
    left = np.where(may_stream, counts, 0)
    left[chosen] = 0
    return max(costs.card * len(chosen) + costs.launch, costs.cpu_seconds(left)), len(chosen)


def main() -> int:
    """Print the table."""
    heads = [f"{tokens} tokens: ms a layer | sent | tokens/s" for tokens in TOKENS]
    print(f"| CPUs | card | {' | '.join(heads)} |\n|---|---|{'---:|' * 3 * len(heads)}")
    for cpus in (MEASURED, TWO_8488C):
        for cards, bus in BUSES.items():
            print(f"| {cpus.name} | {cards} |", end="")
            for tokens in TOKENS:
                seconds, sent = layer_seconds(bus, cpus, tokens_of_experts(tokens))
                rate = tokens / (MOE_LAYERS * seconds)
                print(f" {1e3 * seconds:.0f} | {sent} | {round(rate, -1):.0f} |", end="")
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
