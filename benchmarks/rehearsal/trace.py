"""What a decode step is made of, from the trace of SGLang's profiler (PyTorch's, as JSON).

In each MoE layer a call's inputs go to the host, the CPU's experts run, and their output comes
back; between the two copies the GPU runs its own experts and then waits. That is a *window*. What
lies outside the windows is the GPU's: attention, the router, norms, the head, copies, and gaps in
which it has nothing to do.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Step:
    """Mean seconds of a decode step under the profiler.

    Attributes:
        total: from the end of one to the end of the next.
        windows: the CPU's experts' turn, all layers; ``overlapped`` of it the GPU computes too.
        kernels: the GPU computes, outside the windows.
        copies: of the calls' inputs and outputs.
        idle: the rest.
        timeline: of one layer's turn, kind -> intervals in seconds from its beginning.
    """

    total: float
    windows: float
    overlapped: float
    kernels: float
    copies: float
    idle: float
    timeline: dict[str, list[Interval]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file."""
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def analyse(events: Sequence[dict[str, Any]], layers: int, output_bytes: int) -> Step | None:
    """A decode step of a model of ``layers`` MoE layers; None if the trace shows no two steps.

    Args:
        output_bytes: of a layer call's output: by its size its copy is recognised.
    """
    kernels: list[Interval] = []
    to_host: list[Interval] = []
    back: list[Interval] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        begin = float(event["ts"]) / 1e6
        interval = begin, begin + float(event["dur"]) / 1e6
        if event.get("cat") == "kernel":
            kernels.append(interval)
        elif event.get("cat") == "gpu_memcpy":
            if "DtoH" in event["name"]:
                to_host.append(interval)
            elif "HtoD" in event["name"] and event["args"].get("bytes") == output_bytes:
                back.append(interval)
    kernels.sort()
    to_host.sort()
    back.sort()
    windows: list[Interval] = []
    copied: list[list[Interval]] = []  # of each window: what went there, and what came back
    for output in back:
        inputs = [copy for copy in to_host if copy[1] <= output[0]][-3:]
        if len(inputs) == 3:
            windows.append((inputs[-1][1], output[0]))
            copied.append([*inputs, output])
    # The first and the last step may be cut off.
    whole = len(windows) // layers - 1
    if whole < 1:
        return None
    last = layers * (whole + 1)
    begin, end = copied[layers - 1][-1][1], copied[last - 1][-1][1]
    windows, copied = windows[layers:last], copied[layers:last]
    in_turn = [k for k in merged(kernels) if begin <= k[0] < end]
    overlapped = sum(overlap(k, w) for k in in_turn for w in windows)
    waiting = sum(stop - start for start, stop in windows)
    computing = sum(stop - start for start, stop in in_turn) - overlapped
    copying = sum(stop - start for copies in copied for start, stop in copies)
    total = end - begin
    shown = -1 if layers == 1 else layers // 2
    first, until = copied[shown][0][0], copied[shown][-1][1]
    first = copied[shown - 1][-1][1] if layers > 1 else first
    timeline = {
        "kernels": [_from(first, k) for k in in_turn if first <= k[0] < until],
        "copies": [_from(first, copy) for copy in copied[shown]],
        "CPU experts": [_from(first, windows[shown])],
    }
    return Step(
        total=total / whole,
        windows=waiting / whole,
        overlapped=overlapped / whole,
        kernels=computing / whole,
        copies=copying / whole,
        idle=max(0.0, total - waiting - computing - copying) / whole,
        timeline=timeline,
    )


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Sorted intervals without overlaps."""
    found: list[Interval] = []
    for begin, end in intervals:
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def overlap(a: Interval, b: Interval) -> float:
    """Length of what two intervals share."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def _from(origin: float, interval: Interval) -> Interval:
    return round(interval[0] - origin, 9), round(interval[1] - origin, 9)
