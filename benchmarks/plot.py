"""The roofline: where each engine's calls lie below what memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.limits import Limits


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise BenchmarkError(
            "matplotlib is missing: install requirements/bench.txt, or leave the plot out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def roofline(machine: dict[str, Any], run: dict[str, Any], path: Path) -> None:
    """Draw a run of ``bench_moe`` into a PNG.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    pyplot = load_pyplot()

    measured = Limits.from_json(run["limits"])
    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=110)
    # The dense product reads its weights once for all tokens: it has no place on this axis.
    rows = [row for row in run["engines"] if row.get("cells") and "error" in row]
    points = {
        row["label"]: [(c["GOP/s"] / c["weights GB/s"], c["GOP/s"]) for c in row["cells"]]
        for row in rows
    }
    everything = [x for found in points.values() for x, _ in found] or [1.0, 1000.0]
    low, high = min(everything) / 2, max(everything) * 2
    for isa, rate in measured.int8.items():
        corner = max(low, rate.best / measured.read.best)
        axes.plot([corner, high], [rate.best, rate.best], color="0.5", linestyle="--", linewidth=1)
        axes.text(high, rate.best, f" {isa}", va="center", fontsize=8)
    slope_end = min(high, measured.peak[1] / measured.read.best)
    axes.plot(
        [low, slope_end],
        [low * measured.read.best, slope_end * measured.read.best],
        color="0.5",
        linewidth=1.5,
        label=f"reads {measured.read.best:.0f} GB/s",
    )
    for row in rows:
        ours = row["key"].startswith("ours-")
        x, y = zip(*points[row["label"]], strict=True)
        axes.plot(
            x,
            y,
            marker="o" if row["class"] == 4 else "s",
            linewidth=2.2 if ours else 1,
            markersize=7 if ours else 4,
            label=row["label"],
            zorder=3 if ours else 2,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations for each byte of weights read",
        ylabel="GOP/s",
        title=f"One MoE layer of V3.2, {machine['cpu']}, {run['threads']} threads",
    )
    axes.grid(which="both", color="0.9")
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
