import numpy as np
import pytest

from kt_kernel.gpu_prefill.costs import Costs

ALL = np.ones(4, bool)


def tokens(*counts: int) -> np.ndarray:
    return np.array(counts, np.int64)


def test_those_with_the_most_tokens_stream_until_both_sides_end_together() -> None:
    costs = Costs(card=1.0, expert=0.5, token=0.01, launch=0.0)
    # CPUs alone 7 s; two on the card, 2 s there and 1.5 s here; three would take 3 s.
    assert costs.choose(tokens(200, 50, 300, 0), ALL, []) == [2, 0]


def test_an_expert_without_tokens_never_streams() -> None:
    costs = Costs(card=1e-6, expert=1.0, token=1.0, launch=0.0)
    assert set(costs.choose(tokens(0, 5, 0, 1), ALL, [])) == {1, 3}


def test_what_the_cpus_do_not_hold_never_streams() -> None:
    costs = Costs(card=1e-6, expert=1.0, token=1.0, launch=0.0)
    held = np.array([False, True, True, True])
    assert set(costs.choose(tokens(9, 9, 9, 9), held, [0])) == {1, 2, 3}


def test_nothing_streams_where_the_cpus_are_faster() -> None:
    costs = Costs(card=1.0, expert=0.01, token=0.001)
    assert costs.choose(tokens(9, 9, 9, 9), ALL, []) == []


def test_a_gain_that_is_noise_is_not_taken() -> None:
    costs = Costs(card=0.98, expert=0.0, token=1.0, launch=0.0)
    assert costs.choose(tokens(1, 0, 0, 0), ALL, []) == []


def test_what_is_on_its_way_comes_first_and_is_computed_there() -> None:
    costs = Costs(card=1.0, expert=0.5, token=0.01, launch=0.0)
    assert costs.choose(tokens(200, 50, 300, 0), ALL, [1, 3])[0] == 1


def test_the_cpus_figures_follow_what_calls_take() -> None:
    costs = Costs(card=1.0, expert=1e-3, token=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        experts, pairs = int(rng.integers(10, 250)), int(rng.integers(500, 30000))
        costs.learn_cpu(3e-4 * experts + 2e-5 * pairs, experts, pairs)
    assert costs.expert == pytest.approx(3e-4, rel=0.05)
    assert costs.token == pytest.approx(2e-5, rel=0.05)


def test_calls_that_are_all_alike_keep_the_prediction_right() -> None:
    costs = Costs(card=1.0, expert=1e-3, token=1e-6)
    for _ in range(60):
        costs.learn_cpu(0.2, 100, 10000)
    assert costs.cpu_seconds(np.full(100, 100)) == pytest.approx(0.2, rel=0.02)


def test_the_cards_figure_follows_and_takes_no_nonsense() -> None:
    costs = Costs(card=1.0, expert=1.0, token=1.0)
    for _ in range(60):
        costs.learn_card(0.5, 10)
    for seconds, experts in ((float("nan"), 3), (0.0, 3), (-1.0, 3), (1.0, 0)):
        costs.learn_card(seconds, experts)
        costs.learn_cpu(seconds, experts, 5)
    assert costs.card == pytest.approx(0.05, rel=0.01)
    assert (costs.expert, costs.token) == (1.0, 1.0)
