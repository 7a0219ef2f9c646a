"""The line through a few numbers of layers against one that was measured, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import stats
from benchmarks.rehearsal.fit import extrapolate
from benchmarks.rehearsal.sizes import MOE_LAYERS

Json = dict[str, Any]
PARTS = ("decode", "prefill")


def seconds_of(cell: Any) -> list[float]:
    """The measured times of a ``decode`` or ``prefill`` cell of a server."""
    times: list[float] = cell["seconds"] if isinstance(cell, dict) else cell
    return times


def compare(servers: Sequence[Json], check: Json) -> Json:
    """What the line through ``servers`` says of ``check``, which takes no part in it.

    Args:
        servers, check: what ``variant.measure`` found.

    Returns:
        ``layers``; ``decode`` and ``prefill``: requests or tokens -> seconds ``measured`` (median,
        with ``least`` and ``most``), the ``line`` there, ``low`` and ``high`` of its mean, and
        ``off``, by which share of the measured the line is above it.
    """
    layers = check["layers"]
    found: Json = {"layers": layers, **{part: {} for part in PARTS}}
    for part in PARTS:
        for name, cell in check[part].items():
            samples = {s["layers"]: seconds_of(s[part][name]) for s in servers if name in s[part]}
            if line := extrapolate(samples, layers):
                times = seconds_of(cell)
                measured = stats.median(times)
                found[part][name] = {
                    "measured": measured,
                    "least": min(times),
                    "most": max(times),
                    "line": line.seconds,
                    "low": line.low,
                    "high": line.high,
                    "off": line.seconds / measured - 1,
                }
    return found


def sentences(found: Json, servers: Sequence[Json]) -> list[str]:
    """What the owner of the machine wants to know of it."""
    layers = found["layers"]
    through = " and ".join(str(server["layers"]) for server in servers)
    lines = [f"{layers} MoE layers measured, and the line through {through}, without them, there:"]
    for requests, cell in found["decode"].items():
        count = int(requests)
        what = f"a decode step of {count} request{'' if count == 1 else 's'}"
        line = f"  {what}: {_compared(cell, 1e3, 'ms', 1)}"
        if layers == MOE_LAYERS and cell["line"] > 0:
            rates = [count / cell[name] for name in ("measured", "line")]
            line += f"; {rates[0]:.1f} tokens/s measured, {rates[1]:.1f} by the line"
        lines.append(line)
    for tokens, cell in found["prefill"].items():
        lines.append(f"  the first token of a prompt of {tokens}: {_compared(cell, 1.0, 's', 2)}")
    return lines


def _compared(cell: Json, scale: float, unit: str, digits: int) -> str:
    def shown(name: str, low: str, high: str) -> str:
        text = f"{scale * cell[name]:.{digits}f} {unit}"
        ends = cell[low], cell[high]
        if ends[0] is None or ends[0] == ends[1]:
            return text
        return f"{text} ({scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f})"

    measured = f"{shown('measured', 'least', 'most')} measured, the line says "
    if cell["line"] <= 0:
        return f"{measured}nothing: its times scatter more than they grow with the layers"
    direction = "high" if cell["off"] > 0 else "low"
    return f"{measured}{shown('line', 'low', 'high')}, {abs(cell['off']):.1%} too {direction}"
