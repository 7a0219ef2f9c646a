"""What follows from counts: the most used experts, their order, and their share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kt_kernel.errors import UserError
from kt_kernel.placement.counts import expert_map, expert_order, most_used, share_of

COUNTS = np.array([5, 0, 9, 5, 9, 1], np.int64)


def test_the_most_used_come_first_and_the_rest_in_order() -> None:
    assert [most_used(COUNTS, n) for n in range(4)] == [[], [2], [2, 4], [0, 2, 4]]
    assert expert_order(COUNTS, 3) == [0, 2, 4, 1, 3, 5]
    assert expert_order(COUNTS, 1) == [2, 0, 1, 3, 4, 5]
    assert expert_order(COUNTS, 6) == expert_order(COUNTS, 0) == list(range(6))


def test_nothing_is_moved_without_counts() -> None:
    """The dense layers have none, and a layer may have been idle."""
    found = expert_map({1: COUNTS, 2: 0 * COUNTS}, 3, 6, 2)
    assert found == [list(range(6)), [2, 4, 0, 1, 3, 5], list(range(6))]
    with pytest.raises(UserError, match="counts of layer 2, but the model has 2"):
        expert_map({2: COUNTS}, 2, 6, 2)


def test_no_other_choice_has_a_larger_share() -> None:
    random = np.random.default_rng(1)
    counts = {layer: random.integers(0, 50, 6) for layer in (3, 4)}
    pairs = sum(of.sum() for of in counts.values())
    for resident in range(7):
        share = share_of(counts, resident)
        assert share.pairs == pairs
        best = sum(
            max(of[list(some)].sum() for some in itertools.combinations(range(6), resident))
            for of in counts.values()
        )
        assert share.measured == best / pairs
        assert share.first == sum(of[:resident].sum() for of in counts.values()) / pairs
    assert share_of({3: 0 * COUNTS}, 2).measured == share_of({}, 2).first == 0
