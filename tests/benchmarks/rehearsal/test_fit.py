"""Lines through times of a few layers."""

from __future__ import annotations

import random

import pytest

from benchmarks.rehearsal.fit import extrapolate


def test_a_line_is_found_and_taken_at_all_layers() -> None:
    found = extrapolate({n: [0.005 + 0.002 * n] * 3 for n in (1, 4, 8)}, 58)
    assert found is not None
    assert found.seconds == pytest.approx(0.121)
    assert found.base == pytest.approx(0.005)
    assert found.per_layer == pytest.approx(0.002)
    assert found.low == pytest.approx(found.high)
    assert found.residual == pytest.approx(0)


def test_one_number_of_layers_is_no_line_and_two_samples_no_interval() -> None:
    assert extrapolate({4: [1.0, 1.1]}, 58) is None
    found = extrapolate({1: [1.0], 2: [2.0]}, 58)
    assert found is not None
    assert found.seconds == pytest.approx(58)
    assert (found.low, found.high, found.residual) == (None, None, None)


def test_what_is_not_linear_shows_in_the_residual() -> None:
    found = extrapolate({1: [1.0], 4: [4.0], 8: [9.6]}, 58)
    assert found is not None
    assert found.residual is not None
    assert found.residual > 0.05


def test_a_number_that_was_measured_more_often_does_not_weigh_more() -> None:
    few = extrapolate({1: [1.0], 4: [5.0], 8: [8.0]}, 58)
    many = extrapolate({1: [1.0], 4: [5.0] * 50, 8: [8.0]}, 58)
    assert few is not None
    assert many is not None
    assert many.seconds == pytest.approx(few.seconds)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """A wrong formula (no distance from the mean, say) holds it far less or always."""
    rng = random.Random(1)
    inside = 0
    for _ in range(400):
        samples = {n: [5 + 2 * n + rng.gauss(0, 1) for _ in range(3)] for n in (1, 4, 8)}
        found = extrapolate(samples, 58)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        inside += found.low < 5 + 2 * 58 < found.high
    assert 0.92 < inside / 400 < 0.98
