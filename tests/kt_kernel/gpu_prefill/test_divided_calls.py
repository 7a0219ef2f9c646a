"""A layer's calls of which the card computes a part, with the CPU in its place."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kt_kernel import KTMoEWrapper, packed
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill import start
from kt_kernel.gpu_prefill.costs import Costs
from kt_kernel.gpu_prefill.staging import STAGING_VARIABLE, HostRegister, StagedRows
from kt_kernel.gpu_prefill.start import STAND_IN_VARIABLE, THRESHOLD_VARIABLE
from kt_kernel.self_test import check_card
from tests.kt_kernel.layer_files import write_layer

LAYOUT = packed.PackedLayout(6, 128, 128, "int4")
TOP_K, TOKENS = 3, 24
#: What int8 activations of the CPUs' part cost, relative to the mean.
INT8_ERROR = 0.02


class FirstMost(Costs):
    """Sends so many experts, those with the most tokens, whatever they cost."""

    count = 0

    def choose(
        self, tokens: NDArray[np.int64], may_stream: NDArray[np.bool_], there: list[int]
    ) -> list[int]:
        ready = [e for e in there if tokens[e]][: self.count]
        rest = [e for e in np.argsort(-tokens, kind="stable").tolist() if e not in ready]
        return ready + [e for e in rest if tokens[e] and may_stream[e]][: self.count - len(ready)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layers")
    for layer_idx in range(3):
        write_layer(made, LAYOUT, layer_idx)
    return made


Make = Callable[..., KTMoEWrapper]


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes loaded layers, whose calls of 16 tokens or more the card takes part in."""
    monkeypatch.setenv(STAND_IN_VARIABLE, "float32")
    monkeypatch.setenv(THRESHOLD_VARIABLE, "16")
    start.card_experts.cache_clear()
    start.registration.cache_clear()

    def loaded(layer_idx: int = 0, residents: int = 0, deferred: int = 0) -> KTMoEWrapper:
        wrapper = KTMoEWrapper(
            layer_idx,
            LAYOUT.num_experts,
            TOP_K,
            LAYOUT.hidden_size,
            LAYOUT.intermediate_size,
            num_gpu_experts=residents,
            cpuinfer_threads=2,
            threadpool_count=2,
            weight_path=str(folder),
            method="AMXINT4",
            max_deferred_experts_per_token=deferred,
        )
        wrapper.load_weights(torch.arange(LAYOUT.num_experts))
        return wrapper

    yield loaded
    start.card_experts.cache_clear()
    start.registration.cache_clear()


def send(wrapper: KTMoEWrapper, count: int) -> None:
    """From now on the card computes so many experts."""
    assert wrapper.on_card is not None
    costs = FirstMost(1, 1, 1, measured=True)
    costs.count = count
    wrapper.on_card.card.costs = costs


@functools.cache
def batch(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, LAYOUT.hidden_size, generator=generator)
    ids = torch.rand(tokens, LAYOUT.num_experts, generator=generator).topk(TOP_K).indices
    ids[0, 0] = ids[5] = -1
    return x, ids.int(), torch.rand(tokens, TOP_K, generator=generator)


def on_cpus(
    wrapper: KTMoEWrapper, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same without the card."""
    return wrapper.without_deferral().forward(x, ids, weights)


def difference(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).abs().mean() / want.abs().mean())


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


def run_all(wrappers: list[KTMoEWrapper]) -> list[torch.Tensor]:
    """Outputs of three passes, with four experts of each call on the card."""
    send(wrappers[0], 4)
    return [wrapper.forward(*batch()) for _ in range(3) for wrapper in wrappers]


@pytest.mark.parametrize("registered", [0, 1, 3], ids=["nothing", "a slice", "a layer and a half"])
def test_memory_that_cannot_be_registered_gives_the_same_bits(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    registered: int,
) -> None:
    """And the log says once, when all layers are there, how much of it there is."""
    want = run_all([make(idx) for idx in range(3)])
    start.card_experts.cache_clear()
    start.registration.cache_clear()
    left = iter(range(registered))

    def register(_: NDArray[np.uint8]) -> None:
        if next(left, None) is None:
            raise RuntimeError("out of memory (CUDA error 2)")

    cuda = HostRegister(register, lambda _: None)
    monkeypatch.setattr(start, "registering", lambda _: cuda)
    with caplog.at_level("INFO"):
        wrappers = [make(idx) for idx in range(3)]
    assert wrappers[0].on_card is not None
    layers = wrappers[0].on_card.card._layers
    assert sum(len(layer.staged) for layer in layers.values()) == 6 - registered
    for found, wanted in zip(run_all(wrappers), want, strict=True):
        assert torch.equal(found, wanted)
    assert caplog.text.count("CUDA registered ") == 1
    assert "refused the other" in caplog.text
    assert ("GB/s through staging buffers" in caplog.text) == (registered < 2)


class Pages:
    """What is registered, by address. As CUDA, it refuses what is already, and to register more."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.most = 100

    def register(self, memory: NDArray[np.uint8]) -> None:
        begin = memory.ctypes.data
        if len(self.sizes) == self.most:
            raise RuntimeError("out of memory (CUDA error 2)")
        for other, size in self.sizes.items():
            if begin < other + size and other < begin + memory.nbytes:
                raise RuntimeError("already mapped (CUDA error 712)")
        self.sizes[begin] = memory.nbytes

    def unregister(self, memory: NDArray[np.uint8]) -> None:
        assert self.sizes.pop(memory.ctypes.data) == memory.nbytes


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    made = Pages()
    monkeypatch.setattr(
        start, "registering", lambda _: HostRegister(made.register, made.unregister)
    )
    return made


def reversed_experts(wrapper: KTMoEWrapper) -> None:
    """Load the layer's file with its experts the other way round."""
    wrapper.load_weights(torch.arange(LAYOUT.num_experts).flip(0))


def test_weights_loaded_again_are_those_of_the_next_calls(make: Make, pages: Pages) -> None:
    """Into the same memory, while experts of the old ones are on their way to the card."""
    fresh = make(1)
    reversed_experts(fresh)
    send(fresh, 6)
    want = fresh.forward(*batch())
    del fresh
    start.card_experts.cache_clear()
    start.registration.cache_clear()

    first, second = make(0), make(1)
    assert first.on_card is not None
    send(first, 6)
    registered = dict(pages.sizes)
    first.forward(*batch())
    assert first.on_card.card._ring.on_the_way(1)
    reversed_experts(second)
    assert pages.sizes == registered
    layers = first.on_card.card._layers
    assert not any(layer.staged for layer in layers.values())
    assert torch.equal(second.forward(*batch()), want)


@pytest.mark.parametrize("how", ["a load that fails", "tensors"])
def test_weights_that_change_leave_the_card_first(make: Make, pages: Pages, how: str) -> None:
    """Nothing reads the memory that is written to, and the card computes no old weights later."""
    first, second = make(0), make(1)
    registered = len(pages.sizes)
    send(first, 6)
    first.forward(*batch())
    if how == "tensors":
        shape = LAYOUT.num_experts, 128, 128
        gate, up, down = (torch.full(shape, 0.01) for _ in range(3))
        second.load_weights_from_tensors(gate, up, down, torch.arange(LAYOUT.num_experts))
    else:
        second.weight_path = "/nowhere"
        with pytest.raises(UserError, match="weight path /nowhere does not exist"):
            reversed_experts(second)
    assert len(pages.sizes) == registered / 2
    assert torch.equal(second.forward(*batch()), on_cpus(second, *batch()))


def test_a_layer_made_again_leaves_the_card_to_the_new_one(make: Make, pages: Pages) -> None:
    """Calls of the old one stay with the CPUs: the card would compute them with other weights."""
    first, old = make(0), make(1)
    pages.most = registered = len(pages.sizes)  # no room for both
    send(first, 6)
    first.forward(*batch())
    new = make(1)
    reversed_experts(new)
    assert new.on_card is not None
    assert not new.on_card._layer.staged
    assert len(pages.sizes) == registered
    for wrapper in (old, new, old):
        assert difference(wrapper.forward(*batch()), on_cpus(wrapper, *batch())) < INT8_ERROR
    assert torch.equal(old.forward(*batch()), on_cpus(old, *batch()))
    # What is the new one's stays there when the old one is loaded again from tensors.
    card = new.on_card.card
    old._calls.leave_card()
    assert card.has(new.on_card._layer)
    assert len(pages.sizes) == registered


def test_a_copy_that_fails_is_told_and_leaves_later_calls_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STAGING_VARIABLE, "1")
    wrapper = make()
    send(wrapper, 4)
    want = wrapper.forward(*batch())
    calls = iter(range(100))
    copy = StagedRows.copy

    def failing(self: StagedRows, row: torch.Tensor, target: torch.Tensor) -> None:
        if next(calls) == 3:  # the second slice of the second expert
            raise RuntimeError("the bus is gone")
        copy(self, row, target)

    with monkeypatch.context() as patch:
        patch.setattr(StagedRows, "copy", failing)
        with pytest.raises(RuntimeError, match="the bus is gone"):
            wrapper.forward(*batch())
    for _ in range(3):
        assert torch.equal(wrapper.forward(*batch()), want)


def test_a_forked_process_is_refused_and_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the threads that fill the buffers: a call would wait for ever."""
    monkeypatch.setenv(STAGING_VARIABLE, "1")
    wrapper = make()
    send(wrapper, 4)
    child = os.fork()
    if child == 0:
        try:
            wrapper.forward(*batch())
        except UserError:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


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
