"""Statistics that every published number goes through."""

from __future__ import annotations

import pytest

from benchmarks import stats


def test_ratio_is_taken_pair_by_pair() -> None:
    # The machine was three times slower in the second round: ratios of medians would say 3.
    assert stats.paired_ratio([2, 6, 2], [1, 3, 1]) == 2
    assert stats.paired_ratio([2.0, 2.0, 30.0], [1.0, 10.0, 10.0]) == 2


def test_ratio_refuses_rounds_without_a_partner() -> None:
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        stats.paired_ratio([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="0 and 0 rounds"):
        stats.paired_ratio([], [])


def test_spread_ignores_one_outlier() -> None:
    assert stats.spread([10, 10, 10, 10, 1000]) == 0
    assert stats.spread([8, 9, 10, 11, 12]) == pytest.approx(0.2)
    assert stats.spread([5]) == 0
