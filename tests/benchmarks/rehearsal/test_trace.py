"""A decode step's parts, from a trace made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.rehearsal.trace import analyse, merged, overlap

HIDDEN_BYTES = 2 * 7168


def event(cat: str, name: str, begin: float, length: float, size: int = 0) -> dict[str, Any]:
    """Times in microseconds."""
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": begin,
        "dur": length,
        "args": {"bytes": size},
    }


def layer(at: float) -> list[dict[str, Any]]:
    """100 us: attention 20, copies 3, a window of 70 with a kernel of 30, output 2, gap 5."""
    to_host = "Memcpy DtoH (Device -> Pinned)"
    return [
        event("kernel", "attention", at, 20),
        event("gpu_memcpy", to_host, at + 20, 1, HIDDEN_BYTES),
        event("gpu_memcpy", to_host, at + 21, 1, 32),
        event("gpu_memcpy", to_host, at + 22, 1, 32),
        event("kernel", "fused_moe_kernel", at + 25, 30),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", at + 93, 2, HIDDEN_BYTES),
    ]


def trace(steps: int) -> list[dict[str, Any]]:
    """Steps of two layers, 50 us between them with other kernels and copies; a prompt first."""
    events = [event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1, 9, 32 * HIDDEN_BYTES)]
    for step in range(steps):
        start = 1000 + 250.0 * step
        events += [*layer(start), *layer(start + 100)]
        events.append(event("kernel", "head", start + 200, 10))
        events.append(event("kernel", "head", start + 205, 15))
        events.append(event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 221, 1, 8))
        events.append(event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", start + 240, 1, 8))
    events.append({"ph": "M", "name": "process_name"})
    return events


def test_parts_of_a_step() -> None:
    step = analyse(trace(4), 2, HIDDEN_BYTES)
    assert step is not None
    found = {
        name: value * 1e6 for name, value in step.to_json().items() if isinstance(value, float)
    }
    assert found == pytest.approx(
        {
            "total": 250,
            "windows": 140,
            "overlapped": 60,
            "kernels": 2 * 20 + 20,
            "copies": 2 * (3 + 2),
            "idle": 250 - 140 - 60 - 10,
        },
        rel=1e-6,
    )
    (turn,) = step.timeline["CPU experts"]
    assert turn == pytest.approx((28e-6, 98e-6))


def test_a_trace_without_two_steps_says_nothing() -> None:
    assert analyse([], 2, HIDDEN_BYTES) is None
    assert analyse(trace(1), 2, HIDDEN_BYTES) is None


def test_intervals() -> None:
    assert merged([(0, 2), (1, 3), (3, 4), (6, 7)]) == [(0, 4), (6, 7)]
    assert (overlap((0, 2), (1, 5)), overlap((0, 1), (2, 3))) == (1, 0)
