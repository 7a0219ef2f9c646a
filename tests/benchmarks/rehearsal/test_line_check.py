"""A line against a measured number of layers that it does not go through."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.rehearsal import line_check


def server(layers: int, step: float, first: float) -> dict[str, Any]:
    return {
        "layers": layers,
        "decode": {"1": {"seconds": [step, step, 9.0]}, "8": {"seconds": [2 * step]}},
        "prefill": {"512": [first]},
    }


def even(layers: int) -> dict[str, Any]:
    """5 ms and 2 ms a layer; of a prompt 0.3 s and 0.02 s a layer."""
    found = server(layers, 0.005 + 0.002 * layers, 0.3 + 0.02 * layers)
    found["decode"]["1"]["seconds"].pop()
    return found


def test_the_distance_is_that_of_the_line_without_the_check() -> None:
    """A line through the check, too, would be nearer to it."""
    found = line_check.compare([even(1), even(4)], server(17, 0.040, 0.6))
    one = found["decode"]["1"]
    # The median: one of the three measurements was disturbed.
    assert one["measured"] == pytest.approx(0.040)
    assert one["line"] == pytest.approx(0.039)
    assert one["off"] == pytest.approx(-0.025)
    assert found["prefill"]["512"]["off"] == pytest.approx(0.64 / 0.6 - 1)
    text = "\n".join(line_check.sentences(found, [even(1), even(4)]))
    assert "17 MoE layers measured, and the line through 1 and 4, without them, there:" in text
    assert "of 1 request: 40.0 ms (40.0 to 9000.0) measured, the line says 39.0 ms" in text
    assert "of 8 requests: 80.0 ms measured, the line says 78.0 ms, 2.5% too low" in text
    assert "a prompt of 512: 0.60 s measured, the line says 0.64 s, 6.7% too high" in text
    assert "tokens/s" not in text  # of a part of the model it would be no answer's speed


def test_of_all_layers_the_speeds_are_told_too() -> None:
    found = line_check.compare([even(1), even(8)], server(58, 0.125, 1.5))
    text = "\n".join(line_check.sentences(found, [even(1), even(8)]))
    assert "3.2% too low; 8.0 tokens/s measured, 8.3 by the line" in text


def test_a_line_below_nothing_is_no_figure() -> None:
    """A prompt through one layer once took 0.39 s and through two 0.21: -11 s for 58."""
    servers = [server(1, 0.1, 0.39), server(2, 0.2, 0.21)]
    found = line_check.compare(servers, server(58, 0.125, 2.84))
    text = "\n".join(line_check.sentences(found, servers))
    assert "prompt of 512: 2.84 s measured, the line says nothing: its times scatter" in text


def test_what_only_one_server_was_asked_has_no_line() -> None:
    few, more = even(1), even(4)
    del few["decode"]["8"]
    found = line_check.compare([few, more], server(17, 0.040, 0.6))
    assert set(found["decode"]) == {"1"}
