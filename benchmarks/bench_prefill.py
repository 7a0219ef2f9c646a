"""What a prompt's experts take on the CPUs, on the card, and divided between both.

    python -m benchmarks.bench_prefill [--tokens N ...] [--layers N] [--method M] [--json FILE]

Layers of V3.2's size with random codes; calls as SGLang makes them for a prompt, outside CUDA
graphs, one layer after the other, each routed anew. The limits are measured in the same run: what
the bus brings to the card from pinned memory, and what the CPUs read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.host_description import allowed_cpus, cpu_brand
from benchmarks.rehearsal import packed_layers, plan
from benchmarks.rehearsal.workspace import workspace
from deploy.launch.gpu_memory import V32_CONFIG
from kt_kernel import KTMoEWrapper, packed
from kt_kernel.gpu_prefill.costs import Costs
from kt_kernel.host.machine import survey

FIRST, TOP_K = V32_CONFIG["first_k_dense_replace"], V32_CONFIG["num_experts_per_tok"]
MOE_LAYERS = V32_CONFIG["num_hidden_layers"] - FIRST
WAYS = ("CPUs", "card", "both")


#: x, ids and weights of a call.
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class OnCpus(Costs):
    """Leaves all experts to the CPUs."""

    def choose(
        self, tokens: NDArray[np.int64], may_stream: NDArray[np.bool_], there: list[int]
    ) -> list[int]:
        return []


class OnCard(Costs):
    """Sends all experts to the card."""

    def choose(
        self, tokens: NDArray[np.int64], may_stream: NDArray[np.bool_], there: list[int]
    ) -> list[int]:
        ready = [e for e in there if tokens[e] > 0]
        return ready + [e for e in np.flatnonzero(tokens * may_stream).tolist() if e not in ready]


def bus_bytes_per_second(size: int = 1 << 30) -> float:
    """What copies from pinned memory reach."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - started))
    return best


def wrappers(folder: Path, method: str, layers: int, threads: int) -> list[KTMoEWrapper]:
    """Loaded layers."""
    layout = plan.v32_layout(method)
    numbers = range(FIRST, FIRST + layers)
    packed_layers.write_layers(folder, layout, numbers)
    made = []
    for number in numbers:
        made.append(packed_layers.load_layer(folder, layout, number, 1, threads))
        (folder / packed.layer_file_name(number)).unlink()
    return made


def calls(tokens: int, layers: int) -> list[Inputs]:
    """Inputs of each layer on the card."""
    made = []
    for seed in range(layers):
        torch.manual_seed(seed)
        x = torch.randn(tokens, V32_CONFIG["hidden_size"], device="cuda").to(torch.bfloat16)
        scores = torch.randn(tokens, V32_CONFIG["n_routed_experts"], device="cuda")
        # Experts are not used alike: some get several times the tokens of others.
        scores += 0.5 * torch.randn(V32_CONFIG["n_routed_experts"], device="cuda")
        weights, ids = scores.sigmoid().topk(TOP_K)
        made.append((x, ids.to(torch.int32), weights / weights.sum(1, keepdim=True)))
    return made


def one_pass(
    made: Sequence[KTMoEWrapper], inputs: Sequence[Inputs]
) -> tuple[float, list[torch.Tensor]]:
    """Seconds of a pass through the layers, and their outputs."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    stream = torch.cuda.current_stream().cuda_stream
    outputs = [wrapper.forward(*call, stream) for wrapper, call in zip(made, inputs, strict=True)]
    torch.cuda.synchronize()
    return time.perf_counter() - started, outputs


def main(argv: Sequence[str] | None = None) -> int:
    """0 when measured, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_prefill", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 4096, 16384])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--passes", type=int, default=4, help="of each way; the first is not timed")
    parser.add_argument("--method", choices=packed.METHODS, default="int4")
    parser.add_argument("--folder", type=Path, default=plan.TMPFS, help="for layers of 6 or 12 GB")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no NVIDIA GPU: expected one", file=sys.stderr)
        return 2
    torch.cuda.init()
    with workspace(args.folder) as folder:
        made = wrappers(folder, args.method, args.layers, survey().expert_threads(1))
    bus = bus_bytes_per_second()
    name = f"{torch.cuda.get_device_name()}; {cpu_brand()}, {len(allowed_cpus())} CPUs"
    print(f"{name}; {args.method}; bus {bus / 1e9:.1f} GB/s, ms a layer")
    print(
        "| tokens | "
        + " | ".join(WAYS)
        + " | difference | sent | card busy | CPUs busy | bus, card | bus, both |"
    )
    print("|---:|" + "---:|" * (len(WAYS) + 6))
    rows: list[dict[str, Any]] = []
    on_card = made[0].on_card
    assert on_card is not None
    card = on_card.card
    costs = {"CPUs": OnCpus(1, 1, 1), "card": OnCard(1, 1, 1), "both": card.costs}
    for tokens in args.tokens:
        inputs = calls(tokens, args.layers)
        found: dict[str, Any] = {"tokens": tokens}
        outputs = {}
        for way in WAYS:
            card.costs = costs[way]
            times = []
            for _ in range(args.passes):
                before = dataclasses.asdict(card.totals)
                seconds, outputs[way] = one_pass(made, inputs)
                times.append(seconds)
            found[way] = 1e3 * median(times[1:]) / args.layers
            done = {k: v - before[k] for k, v in dataclasses.asdict(card.totals).items()}
            found[f"{way}, last pass"] = {k: v / args.layers for k, v in done.items()}
            found[f"{way}, of the bus"] = done["bytes_sent"] / seconds / bus
        cpus, both = (torch.cat([o.float() for o in outputs[w]]) for w in ("CPUs", "both"))
        found["difference"] = float((cpus - both).abs().mean() / cpus.abs().mean())
        found["costs"] = [card.costs.card, card.costs.expert, card.costs.token]
        rows.append(found)
        ways = " | ".join(f"{found[w]:.1f}" for w in WAYS)
        last = found["both, last pass"]
        print(
            f"| {tokens} | {ways} | {found['difference']:.4f} | {last['experts_on_card']:.0f} | "
            f"{1e3 * last['card_seconds']:.1f} | {1e3 * last['cpu_seconds']:.1f} | "
            f"{100 * found['card, of the bus']:.0f}% | {100 * found['both, of the bus']:.0f}% |",
            flush=True,
        )
    if args.json:
        result = {"machine": name, "bus": bus, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
