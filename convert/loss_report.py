"""``--report``: what a conversion cost, and what it lost, by projection and layer.

The loss is that of the matrices that are compared with the source when a file is read back; the
manifest keeps it, so a run that goes on with another's work reports all layers.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.manifest import Manifest
from convert.source.experts import ExpertProjection
from kt_kernel.errors import UserError
from kt_kernel.files.durable import named_write_errors, replace_file
from kt_kernel.packed import PROJECTIONS

WORST = 10


def decibels(error: float) -> float | None:
    """Signal-to-noise ratio of a relative error in dB; None for no error at all."""
    return round(-20 * math.log10(error), 2) if error else None


def _together(errors: list[float]) -> float | None:
    """The ratio of matrices together: the mean of their squared relative errors."""
    return decibels(math.sqrt(sum(error * error for error in errors) / max(1, len(errors))))


@dataclass(frozen=True)
class Cost:
    """What this run did: layers, weights and seconds."""

    layers: int
    weights: int
    seconds: float


def make_report(manifest: Manifest, cost: Cost) -> dict[str, Any]:
    """The report as JSON.

    ``snr_db`` is the ratio of each projection in each layer, ``worst`` the sampled matrices with
    the lowest ratio; None stands for weights without any error.
    """
    identity = manifest.identity
    by_layer: dict[str, dict[str, float | None]] = {}
    every: dict[str, list[float]] = {projection: [] for projection in PROJECTIONS}
    ranked: list[tuple[float, str]] = []
    experts = 0
    for layer_idx, record in sorted(manifest.layers.items()):
        found: dict[str, list[float]] = {projection: [] for projection in PROJECTIONS}
        for name, error in record.errors.items():
            expert, projection = name.split(".")
            found[projection].append(error)
            ranked.append((error, ExpertProjection(layer_idx, int(expert), projection).weight))
        experts = max(experts, len(found["gate"]))
        for projection, errors in found.items():
            every[projection] += errors
        by_layer[str(layer_idx)] = {name: _together(errors) for name, errors in found.items()}
    ranked.sort(key=lambda row: (-row[0], row[1]))
    return {
        "method": identity.layout.method,
        "input_type": identity.input_type,
        "source": identity.origin or {"fingerprint": identity.fingerprint},
        "complete": manifest.complete,
        "layers": len(manifest.layers),
        "layers_in_all": len(identity.moe_layers),
        "bytes": sum(record.bytes for record in manifest.layers.values()),
        "bits_per_weight": identity.layout.bits_per_weight(),
        "this_run": {
            "layers": cost.layers,
            "seconds": round(cost.seconds, 3),
            "weights_per_second": round(cost.weights / cost.seconds) if cost.layers else None,
        },
        "experts_measured_per_layer_at_most": experts,
        "experts_per_layer": identity.layout.num_experts,
        "snr_db": {name: _together(errors) for name, errors in every.items()},
        "snr_db_by_layer": by_layer,
        "worst": [{"tensor": name, "snr_db": decibels(error)} for error, name in ranked[:WORST]],
    }


def summary(report: dict[str, Any]) -> str:
    """The report's line of quality."""
    ratios = ", ".join(f"{name} {_shown(value)}" for name, value in report["snr_db"].items())
    worst = report["worst"][0] if report["worst"] else None
    tail = f"; worst {worst['tensor']} {_shown(worst['snr_db'])}" if worst else ""
    return (
        f"signal to noise, up to {report['experts_measured_per_layer_at_most']} of "
        f"{report['experts_per_layer']} experts of each layer measured: {ratios}{tail}"
    )


def _shown(ratio: float | None) -> str:
    return "exact" if ratio is None else f"{ratio:.1f} dB"


def check_report_path(path: Path) -> None:
    """Check that the report can be written, before the work.

    Raises:
        UserError: its directory does not exist or cannot be written, or the name is that of a plot
            or a directory.
    """
    if not path.parent.is_dir():
        raise UserError(f"--report {path}: directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--report {path}: cannot write to {path.parent}, choose another directory")
    if path.is_dir() or path.suffix != ".json":
        raise UserError(f"--report {path}: expected the name of a file that ends in .json")


def write_report(path: Path, report: dict[str, Any]) -> str:
    """Write the JSON and, where matplotlib is installed, a plot beside it; says what it wrote.

    Raises:
        UserError: a file cannot be written.
    """
    replace_file(path, (json.dumps(report, indent=1) + "\n").encode())
    plot = path.with_suffix(".png")
    try:
        import matplotlib
    except ImportError:
        return f"report: {path}; no plot: matplotlib is missing (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=110)
    layers = [int(idx) for idx in report["snr_db_by_layer"]]
    for projection in PROJECTIONS:
        ratios = [row[projection] for row in report["snr_db_by_layer"].values()]
        values = [math.nan if ratio is None else ratio for ratio in ratios]
        axes.plot(layers, values, marker=".", label=projection)
    axes.set(xlabel="layer", ylabel="signal to noise in dB", title=summary(report).split(":")[0])
    axes.legend()
    with named_write_errors(plot):
        figure.savefig(plot, bbox_inches="tight")
    pyplot.close(figure)
    return f"report: {path}, {plot}"
