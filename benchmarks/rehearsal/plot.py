"""The picture: the lines through what was measured, and one layer's turn on GPU and CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plot import load_pyplot
from benchmarks.rehearsal.line_check import seconds_of
from benchmarks.rehearsal.sizes import MOE_LAYERS

_COLOURS = {"kernels": "tab:blue", "copies": "tab:orange", "CPU experts": "tab:green"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result into a PNG.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    pyplot = load_pyplot()

    check = result.get("check") or {}
    figure, (decode, prefill, turn) = pyplot.subplots(1, 3, figsize=(16, 5), dpi=100)
    for axes, part, title, unit in (
        (decode, "decode", "a decode step, ms", 1e3),
        (prefill, "prefill", "time to the first token, s", 1.0),
    ):
        names = result["servers"][-1][part]
        for number, name in enumerate(names):
            colour = f"C{number % 10}"
            for server in result["servers"]:
                times = seconds_of(server[part].get(name, []))
                axes.plot([server["layers"]] * len(times), [unit * t for t in times], ".", c=colour)
            if name in check.get(part, {}):
                times = seconds_of(check[part][name])
                axes.plot([check["layers"]] * len(times), [unit * t for t in times], "x", c=colour)
            cell = result["fits"][part].get(name)
            label = f"{name} request{'s' if name != '1' else ''}"
            label = label if part == "decode" else f"{name} tokens"
            if cell:
                ends = [cell["base"], cell["base"] + cell["per_layer"] * MOE_LAYERS]
                line = [unit * max(t, 1e-6) for t in ends]
                axes.plot([0, MOE_LAYERS], line, c=colour, linewidth=1, label=label)
        if check.get(part):
            axes.plot([], [], "x", c="0.3", label=f"{check['layers']} layers, not in the line")
        axes.set(xlabel="MoE layers", title=title, xlim=(0, MOE_LAYERS + 1))
        axes.grid(color="0.9")
        if names:
            axes.legend(fontsize=8)
    step = result["servers"][-1].get("step")
    if step:
        for row, (kind, intervals) in enumerate(step["timeline"].items()):
            bars = [(1e3 * a, 1e3 * (b - a)) for a, b in intervals]
            turn.broken_barh(bars, (row - 0.3, 0.6), color=_COLOURS[kind])
        turn.set(yticks=range(len(step["timeline"])), yticklabels=list(step["timeline"]))
        turn.set(xlabel="ms", title="one layer of a decode step, under the profiler")
        turn.grid(axis="x", color="0.9")
    else:
        turn.axis("off")
    machine = result["machine"]
    figure.suptitle(f"{result['method']} experts, {machine['cpu']}, {result['card'] or 'no GPU'}")
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
