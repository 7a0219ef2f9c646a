"""A layer's calls of which the card computes a part, with the CPU in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kt_kernel import KTMoEWrapper
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill import start
from kt_kernel.gpu_prefill.start import THRESHOLD_VARIABLE
from kt_kernel.self_test import check_card
from tests.kt_kernel.gpu_prefill.divided_calls import (
    INT8_ERROR,
    LAYOUT,
    Make,
    batch,
    difference,
    on_cpus,
    send,
)


@pytest.mark.parametrize("residents", [0, 2])
def test_divided_at_every_place(make: Make, residents: int) -> None:
    """All of the CPUs' experts, once each: with padding, and residents that are nobody's here."""
    wrapper = make(residents=residents)
    want = on_cpus(wrapper, *batch())
    for count in range(LAYOUT.num_experts + 1):
        send(wrapper, count)
        card = wrapper.on_card
        assert card is not None
        before = card.card.totals.experts_on_card
        found = wrapper.forward(*batch())
        sent = card.card.totals.experts_on_card - before
        assert sent == min(count, LAYOUT.num_experts - residents)
        assert torch.equal(found, want) if sent == 0 else 0 < difference(found, want) < INT8_ERROR


def test_every_expert_is_counted_once_wherever_it_is_computed(make: Make) -> None:
    """The counts decide which experts stay on the GPU at the next start."""
    wrapper = make(residents=1)
    x, ids, weights = batch()
    want = np.bincount(ids[ids >= 0].numpy(), minlength=LAYOUT.num_experts)
    measured = wrapper.expert_counts()  # those of the first layer's own calls
    for calls, count in enumerate((0, 2, 6), start=1):
        send(wrapper, count)
        before = np.array(wrapper.routed_pairs())
        wrapper.forward(x, ids, weights)
        np.testing.assert_array_equal(wrapper.expert_counts(), measured + calls * want)
        resident, streamed, cpu = np.array(wrapper.routed_pairs()) - before
        assert (resident, resident + streamed + cpu) == (want[0], want.sum())
        assert (streamed > 0, cpu > 0) == (count > 0, count < 6)


def test_the_tensors_may_change_once_submitted(make: Make) -> None:
    """SGLang masks the ids and overwrites the hidden states before it asks for the result."""
    wrapper = make()
    send(wrapper, 3)
    want = wrapper.forward(*batch())
    x, ids, weights = (tensor.clone() for tensor in batch())
    wrapper.submit_forward(x, ids, weights)
    x.fill_(torch.nan), ids.fill_(-1), weights.zero_()
    assert torch.equal(wrapper.sync_forward(x), want)


def test_few_tokens_and_other_dtypes_stay_with_the_cpus(make: Make) -> None:
    wrapper = make()
    send(wrapper, 6)
    few = batch(15)
    assert torch.equal(wrapper.forward(*few), on_cpus(wrapper, *few))
    x, ids, weights = batch()
    other = x.bfloat16(), ids, weights
    assert torch.equal(wrapper.forward(*other), on_cpus(wrapper, *other))


@pytest.mark.parametrize("count", [0, 3])
def test_calls_that_the_card_may_take_part_in_defer_nothing(make: Make, count: int) -> None:
    """Else a result would depend on how long the two sides took."""
    layers = [make(idx, deferred=1) for idx in range(2)]
    send(layers[0], count)
    for layer in layers:
        assert difference(layer.forward(*batch()), on_cpus(layer, *batch())) < INT8_ERROR
    assert KTMoEWrapper._deferred is None


def test_what_the_layer_before_has_deferred_is_added(make: Make) -> None:
    """The card takes part in one layer only, whose experts are in its memory."""
    first, second = make(0, deferred=1), make(1, deferred=1)
    first._calls.on_card = None
    whole = on_cpus(first, *batch()), on_cpus(second, *batch())
    now = first.forward(*batch())
    found = second.forward(*batch())
    assert difference(found, sum(whole, -now)) < INT8_ERROR


def test_an_id_that_is_none_is_told_as_ever(make: Make) -> None:
    wrapper = make()
    send(wrapper, 3)
    x, ids, weights = batch()
    for bad in (LAYOUT.num_experts, -2):
        wrong = ids.clone()
        wrong[7, 1] = bad
        with pytest.raises(UserError, match=rf"expert id {bad} of token 7 is outside \[0, 6\)"):
            wrapper.forward(x, wrong, weights)
    assert difference(wrapper.forward(*batch()), on_cpus(wrapper, *batch())) < INT8_ERROR


def test_a_call_that_fails_midway_or_is_forgotten_harms_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(0), make(1)
    send(first, 4)
    assert first.on_card is not None
    card = first.on_card.card
    with monkeypatch.context() as patch:
        patch.setattr(card, "_multiply", lambda *_: (_ for _ in ()).throw(RuntimeError("gone")))
        with pytest.raises(RuntimeError, match="gone"):
            first.forward(*batch())
    other = make(0)
    other.submit_forward(*batch())
    del other  # cancelled: nobody asks for its result
    for wrapper in (first, second, first):
        assert difference(wrapper.forward(*batch()), on_cpus(wrapper, *batch())) < INT8_ERROR


def test_the_costs_are_measured_when_the_first_layer_is_loaded(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Under SGLang's default dtype, too, which is bf16 while a model is loaded."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with caplog.at_level("INFO"):
            wrapper = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert wrapper.on_card is not None
    costs = wrapper.on_card.card.costs
    assert costs.measured
    assert 0 < costs.card < 1
    assert 0 < costs.expert < 1
    assert 0 < costs.token < 1
    assert "prompts of 16 tokens or more use the card, too" in caplog.text


def test_the_self_test_finds_a_card_that_computes_something_else(make: Make) -> None:
    wrapper = make()
    check_card(wrapper)
    assert wrapper.on_card is not None
    card = wrapper.on_card.card
    card._layers[0] = card._layers[0].__class__(
        0,
        tuple(torch.roll(part, 1, dims=0) for part in card._layers[0].slices),
        *(getattr(card._layers[0], name) for name in ("where", "held", "tables")),
    )
    with pytest.raises(UserError, match=r"differs by \d+% from the CPUs'"):
        check_card(wrapper)


@pytest.mark.parametrize(
    ("text", "tokens"), [("auto", 64), ("", 64), ("none", None), (" 1 ", 1), ("4096", 4096)]
)
def test_thresholds(text: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THRESHOLD_VARIABLE, text)
    assert start.threshold() == tokens


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "²", "9" * 5000])
def test_a_threshold_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THRESHOLD_VARIABLE, text)
    with pytest.raises(UserError, match=r"expected a number of tokens, auto or none$"):
        start.threshold()


def test_none_leaves_prompts_with_the_cpus(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THRESHOLD_VARIABLE, "none")
    assert make().on_card is None
