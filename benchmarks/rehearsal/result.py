"""From what servers showed to what the whole model will do: numbers for JSON and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import stats
from benchmarks.rehearsal import line_check, soak
from benchmarks.rehearsal.fit import extrapolate
from benchmarks.rehearsal.packed_layers import layer_bytes
from benchmarks.rehearsal.plan import v32_layout
from benchmarks.rehearsal.sizes import MOE_LAYERS, config_of
from deploy.checks.needs import SERVER_BYTES
from deploy.launch.gpu_memory import V32_CONFIG, GpuSizes
from kt_kernel.files.units import in_gib
from kt_kernel.host.gpus import Gpu

KIND = "rehearsal"
#: Experts a call that are so far from what even routing takes say that something is broken.
_UNLIKE = 0.3
#: In place of a figure.
_NO_LINE = "no telling, its times scatter more than they grow with the layers (more --rounds)"
SCHEMA = 1

Json = dict[str, Any]


def derive(found: Json) -> Json:
    """The result with what follows from the measured: ``fits``, ``parts`` and ``line_check``."""
    best = max(_best_reads(found))
    derived = {**found, "fits": fits(found["servers"], best, found["method"])}
    derived["parts"] = parts_of_step(derived)
    if _is_measured(found.get("check")):
        derived["line_check"] = line_check.compare(found["servers"], found["check"])
    return derived


def _is_measured(check: Json | None) -> bool:
    return check is not None and "error" not in check


def largest(found: Json) -> Json:
    """What was found of the server with the most layers, the check's included."""
    checks = [found["check"]] if _is_measured(found.get("check")) else []
    return max([*found["servers"], *checks], key=lambda server: int(server["layers"]))


def _best_reads(found: Json) -> list[float]:
    """Best read bandwidths, GB/s, in the order in which they were measured."""
    return [reads["best"] for reads in found["reads GB/s"].values()]


def fits(servers: Sequence[Json], bandwidth: float, method: str) -> Json:
    """Estimates for all layers.

    Args:
        servers: what ``variant.measure`` found, one for each number of layers.
        bandwidth: best read bandwidth of the same run, GB/s.
        method: format of the packed weights.

    Returns:
        ``prefill`` and ``decode``: tokens or requests -> estimate; those of the decode with the
        ``bound``: seconds to read the weights of the experts that the calls of the largest server
        used, in all layers, and their ``experts`` a call.
    """
    last = servers[-1]
    expert = layer_bytes(v32_layout(method)) / V32_CONFIG["n_routed_experts"]
    found: Json = {"prefill": {}, "decode": {}}
    for tokens in last["prefill"]:
        samples = {s["layers"]: s["prefill"][tokens] for s in servers if tokens in s["prefill"]}
        if estimate := extrapolate(samples, MOE_LAYERS):
            found["prefill"][tokens] = estimate.to_json()
    for requests, cell in last["decode"].items():
        samples = {
            s["layers"]: s["decode"][requests]["seconds"]
            for s in servers
            if requests in s["decode"]
        }
        bound = MOE_LAYERS * cell["experts"] * expert / bandwidth / 1e9
        if estimate := extrapolate(samples, MOE_LAYERS):
            found["decode"][requests] = {
                **estimate.to_json(),
                "experts": cell["experts"],
                "bound": bound,
            }
    return found


def computed_card_bytes(layers: int, values: Mapping[str, Any], gpu: Gpu) -> Json:
    """docs/gpu-memory.md's formulas for that many MoE layers, bytes."""
    sizes = GpuSizes(config_of(layers), multiprocessors=gpu.multiprocessors)
    memory = sizes.memory(values, gpu.free_bytes)
    parts = ("weights", "experts", "cache", "workspace", "total")
    return {name: getattr(memory, name) for name in parts}


def answer(result: Json) -> list[str]:
    """What the owner of the machine wants to know, in sentences."""
    method = result["method"]
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cpus']} CPUs"
    if result["card"]:
        where += f", {result['card']}"
    kept = result["resident"]
    lines = [f"{where}; {method} experts, {kept} of each layer on the GPU:"]
    if result.get("settings"):
        pairs = " ".join(f"{name}={value}" for name, value in result["settings"].items())
        lines[0] = f"{lines[0][:-1]}; {pairs}:"
    if result["card"] is None:
        lines += _without_card(result)
    elif not result["fits"]["decode"]:
        lines.append(
            "  One number of layers gives no line through it: ask for two or more (--layers 1,2)."
        )
    else:
        lines += _with_card(result)
    lines += _line_check(result) + _memory(result)
    if found := largest(result).get("soak"):
        lines += soak.sentences(found)
    return lines


def _with_card(result: Json) -> list[str]:
    fitted = result["fits"]
    counts = " and ".join(str(server["layers"]) for server in result["servers"])
    lines = ["With this machine V3.2 will"]
    for requests, cell in fitted["decode"].items():
        count = int(requests)
        each = "answer" if count == 1 else f"answer {count} requests together"
        if _scattered(cell):
            lines.append(f"  {each}: {_NO_LINE}")
            continue
        speed = f"{count / cell['seconds']:.1f} tokens/s{_interval(cell, count)}"
        share = cell["bound"] / cell["seconds"]
        lines.append(
            f"  {each} at {speed}, {share:.0%} of the {count / cell['bound']:.1f} that reading the "
            "experts' weights allows"
        )
    for tokens, cell in fitted["prefill"].items():
        if _scattered(cell):
            lines.append(f"  take to the first token of a prompt of {tokens}: {_NO_LINE}")
            continue
        lines.append(
            f"  take {_seconds(cell['seconds'])}{_interval(cell, 0)} to the first token of a "
            f"prompt of {tokens}, {int(tokens) / cell['seconds']:.0f} tokens/s"
        )
    lines.append(
        f"By the line through {counts} MoE layers, of {MOE_LAYERS}; in parentheses 95% of the "
        "scatter around it and the largest distance of a point from it."
    )
    best = _best_reads(result)
    shown = ", ".join(f"{rate:.0f}" for rate in best)
    lines.append(f"Reads before, between and after the servers: {shown} GB/s.")
    if max(best) > 1.1 * min(best):
        lines[-1] += (
            " The machine changed meanwhile; against the lowest the shares are "
            f"{max(best) / min(best):.2f} times as large."
        )
    lines.append(f"What limits it: {_limit(result)}")
    for requests, decode in result["servers"][-1]["decode"].items():
        if abs(decode["experts"] / decode["uniform"] - 1) > _UNLIKE:
            lines.append(
                f"Do not trust the figure of {requests} requests: a layer read "
                f"{decode['experts']:.1f} experts, {decode['uniform']:.1f} if all were as likely; "
                "a GPU kernel that computes nothing, or the wrong thing, does that."
            )
    return lines


def _scattered(cell: Json) -> bool:
    """Whether a line's value at all layers may as well be nothing."""
    return bool(cell["seconds"] <= 0 or (cell["low"] is not None and cell["low"] <= 0))


def _seconds(value: float) -> str:
    if value >= 10:
        return f"{value:.0f} s"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _interval(cell: Json, count: int) -> str:
    """Interval and residual; of tokens/s for so many requests, of seconds for 0."""
    words = []
    if cell["low"] is not None:
        ends = (cell["low"], cell["high"])
        if count:
            ends = (count / cell["high"], count / cell["low"])
        words.append(f"{ends[0]:.1f} to {ends[1]:.1f}")
    if cell["residual"] is not None:
        words.append(f"{cell['residual']:.1%} off")
    return f" ({', '.join(words)})" if words else ""


def parts_of_step(result: Json) -> dict[str, float] | None:
    """Seconds of a whole model's decode step of one request, by part; None without two profiles.

    The engine's clocks tell of the calls without the profiler, the profiles of the rest, by the
    same lines. What they all leave of the fitted step is ``other``: the scheduler, and what the
    profiler changes.
    """
    cell = result["fits"]["decode"].get("1")
    steps = {s["layers"]: s["step"] for s in result["servers"] if s.get("step")}
    if cell is None or len(steps) < 2:
        return None

    def profiled(part: str) -> float:
        line = extrapolate({n: [step[part]] for n, step in steps.items()}, MOE_LAYERS)
        return line.seconds if line else 0.0

    decode = result["servers"][-1]["decode"]["1"]
    calls = MOE_LAYERS * (decode["prepare"] + decode["workers"])
    parts = {
        "reading the experts": cell["bound"],
        "CPU experts besides reading": calls - cell["bound"],
        "starting and ending calls": max(0.0, profiled("windows") - calls),
        "copies": profiled("copies"),
        "GPU kernels": profiled("kernels"),
        "GPU idle": max(0.0, profiled("idle")),
    }
    parts["other"] = cell["seconds"] - sum(parts.values())
    return parts


def _limit(result: Json) -> str:
    # A published result keeps the names that its parts were measured under.
    parts = result["parts"]
    cell = result["fits"]["decode"].get("1")
    if parts is None or cell is None:
        last = result["servers"][-1]
        decode = next(iter(last["decode"].values()))
        step = stats.median(decode["seconds"])
        call = last["layers"] * (decode["prepare"] + decode["workers"])
        return f"the CPUs' experts take {call / step:.0%} of a step of {last['layers']} MoE layers."
    shown = ", ".join(
        f"{name} {seconds * 1e3:.1f} ms ({seconds / cell['seconds']:.0%})"
        for name, seconds in parts.items()
    )
    return f"of a step of {cell['seconds'] * 1e3:.0f} ms: {shown}."


def _without_card(result: Json) -> list[str]:
    """The CPU mode's own times say nothing of a server with a card: only the experts' part does."""
    most = largest(result)
    lines = ["Without a card only the experts' part of a step is like that of a server:"]
    for requests, decode in most["decode"].items():
        seconds = MOE_LAYERS * (decode["prepare"] + decode["workers"])
        lines.append(
            f"  {requests} request{'s' if requests != '1' else ''}: {seconds * 1e3:.0f} ms for "
            f"{MOE_LAYERS} layers, so at most {int(requests) / seconds:.1f} tokens/s with any card"
        )
    return lines


def _line_check(result: Json) -> list[str]:
    if compared := result.get("line_check"):
        return line_check.sentences(compared, result["servers"])
    if check := result.get("check"):
        return [f"{check['layers']} MoE layers, to check the line, could not be measured."]
    return []


def _memory(result: Json) -> list[str]:
    packed = MOE_LAYERS * layer_bytes(v32_layout(result["method"]))
    share = 1 - result["resident"] / V32_CONFIG["n_routed_experts"]
    needed = packed * (share if result["card"] else 1.0)
    most = largest(result)
    here = needed / MOE_LAYERS * most["layers"]
    server = max(most["memory_bytes"] - here, 0.0)
    found = result["machine"]["memory_bytes"]
    total = needed + max(server, SERVER_BYTES)
    lines = [
        f"Memory: {total / 1e9:.0f} GB, {needed / 1e9:.0f} of them experts; the machine has "
        f"{found / 1e9:.0f}" + (": not enough for the whole model." if found < total else ".")
    ]
    card = result.get("card_memory")
    if card:
        lines.append(
            f"GPU memory: {in_gib(card['computed']['total'])} GiB computed for the whole model "
            f"of {in_gib(card['free'])}; of {most['layers']} MoE layers "
            f"{in_gib(card['computed_here']['total'])} computed, "
            f"{in_gib(most['card_bytes'])} seen."
        )
    return lines
