"""The ring and the products on streams that work late, as a card's streams do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kt_kernel import _ext, packed
from kt_kernel.gpu_prefill.card import CardExperts, ExpertShape, count_ids, route
from kt_kernel.gpu_prefill.costs import Costs
from kt_kernel.gpu_prefill.packed_layer import PackedLayer, packed_layer
from kt_kernel.gpu_prefill.staging import Registered, StagedRows, StagingBuffers
from kt_kernel.gpu_prefill.streams import DirectStream, Stream
from kt_kernel.host.cpus import allowed_cpus
from tests import reference
from tests.kt_kernel.gpu_prefill.thread_stream import ThreadStream
from tests.layers import random_batch, shared_layer
from tests.shapes import LayerShape

Streams = tuple[Stream, Stream, Stream]
SHAPE = LayerShape(12, 3, 128, 192)
METHOD = "int4"
TOKENS = 40


@pytest.fixture
def streams() -> Iterator[Streams]:
    made = ThreadStream(0), ThreadStream(1), ThreadStream(2)
    yield made
    for stream in made:
        stream.end()


def direct_streams() -> Streams:
    return DirectStream(), DirectStream(), DirectStream()


def layer(layer_idx: int) -> PackedLayer:
    """The same weights in each layer, shifted by one expert so that a mix-up shows."""
    wrapper = shared_layer(SHAPE).wrapper(METHOD, threadpool_count=2)
    tables = torch.from_numpy(np.array(_ext.int4_tables(METHOD)))
    found = packed_layer(layer_idx, wrapper._weights.layer.slices, np.ones(12, bool), tables)
    rolled = tuple(torch.roll(part, layer_idx, dims=0) for part in found.slices)
    return replace(found, slices=rolled)


def experts_of(layer_idx: int, among: list[int]) -> dict[int, reference.Expert]:
    weights = shared_layer(SHAPE).packed(METHOD)
    return {e: weights[(e - layer_idx) % 12] for e in among}


def card(streams: Streams, slots: int = 3) -> CardExperts:
    shape = ExpertShape(12, 128, 192, packed.METHODS[METHOD].block_k)
    cpu = torch.device("cpu")
    costs = Costs(1e-6, 1.0, 1.0)
    first = layer(0)
    staging = StagingBuffers(None, [[allowed_cpus()[0].id]])
    sizes = first.slot_bytes, cpu, torch.float32
    made = CardExperts(shape, *sizes, *streams, costs, staging, slots, rows=8)
    for added in (first, layer(1), layer(2)):
        made.add(added)
    return made


class Call:
    """A batch of its own seed, and what a layer makes of it."""

    def __init__(self, seed: int, tokens: int = TOKENS) -> None:
        self.x, self.ids, self.weights = random_batch(SHAPE, tokens, seed)
        self.ids[0, 0] = -1
        self.here = self.ids.numpy().astype(np.int64)
        self.counts = np.bincount(self.here.ravel() + 1, minlength=13)[1:]

    def on(
        self, card: CardExperts, layer_idx: int, experts: list[int] | None = None
    ) -> torch.Tensor:
        chosen = card.choose(layer_idx, self.counts, np.zeros(12, bool))
        self.chosen = chosen if experts is None else experts
        routed = route(self.ids, self.weights, count_ids(self.ids, 12))
        out = card.run(layer_idx, self.x, routed, self.chosen)
        self.cpu = torch.randn(self.x.shape)
        return card.finish(out, self.cpu)

    def want(self, layer_idx: int) -> np.ndarray:
        experts = experts_of(layer_idx, self.chosen)
        x, ids, weights = self.x.numpy(), self.ids.numpy(), self.weights.numpy()
        want: np.ndarray = reference.moe(x, ids, weights, experts, False) + self.cpu.numpy()
        return want


def test_passes_through_the_layers(streams: Streams) -> None:
    """More experts than slots, pieces of an expert's tokens, and copies ahead of the next layer."""
    made = card(streams)
    for seed in range(3):
        for layer_idx in range(3):
            call = Call(3 * seed + layer_idx)
            found = call.on(made, layer_idx)
            assert len(call.chosen) == 12
            assert reference.relative_error(found.numpy(), call.want(layer_idx)) < 1e-5
    # Of the 36 experts of a pass, 3 were on their way before each layer but the first.
    slot = layer(0).slot_bytes
    assert made.totals.bytes_sent == 3 * (36 - 2 * 3) * slot
    assert made.totals.experts_on_card == 3 * 36


def test_late_streams_and_direct_ones_give_the_same_bits(streams: Streams) -> None:
    late, direct = card(streams), card(direct_streams())
    for layer_idx in range(3):
        found = []
        for made in (late, direct):
            torch.manual_seed(0)  # the CPUs' part
            found.append(Call(layer_idx).on(made, layer_idx))
        assert torch.equal(*found)


def test_staging_buffers_change_no_bit(streams: Streams) -> None:
    """Of the first slice every other expert, of the second all: rows of both kinds in a layer."""
    late, direct = card(streams), card(direct_streams())
    every = np.ones(12, bool)
    for layer_idx in range(3):
        other = np.arange(12) % 2 == layer_idx % 2
        rows = {0: other, 1: every}
        made = {
            number: StagedRows(rows[number], _ext.Staging(None, [allowed_cpus()[0].id], 2, 2, 1000))
            for number in rows
        }
        late.add(replace(layer(layer_idx), staged=made))
    for layer_idx in (0, 1, 2, 0):
        found = []
        for made_card in (late, direct):
            torch.manual_seed(0)  # the CPUs' part
            found.append(Call(layer_idx).on(made_card, layer_idx))
        assert torch.equal(*found)


def test_some_experts_are_those_and_no_others(streams: Streams) -> None:
    made = card(streams)
    call = Call(0)
    found = call.on(made, 0, [7, 2])
    assert reference.relative_error(found.numpy(), call.want(0)) < 1e-5


def test_a_pass_that_stops_leaves_nothing_for_the_next(streams: Streams) -> None:
    """Layer 1's first experts are on their way when the next pass begins at layer 0."""
    made = card(streams)
    for seed in range(3):
        call = Call(seed)
        found = call.on(made, 0)
        assert reference.relative_error(found.numpy(), call.want(0)) < 1e-5


def test_experts_on_their_way_that_nobody_wants_are_dropped(streams: Streams) -> None:
    made = card(streams)
    Call(0).on(made, 0)
    call = Call(1)
    there = made._ring.on_the_way(1)
    wanted = [e for e in range(12) if e not in there[:2]]
    found = call.on(made, 1, there[2:] + [e for e in wanted if e not in there])
    assert reference.relative_error(found.numpy(), call.want(1)) < 1e-5


def test_a_layer_loaded_again_gives_its_new_weights(streams: Streams) -> None:
    """Layer 1's first experts are on their way, and those of the layer before would be taken."""
    made, fresh = card(streams), card(direct_streams())
    Call(0).on(made, 0)
    assert len(made._ring.on_the_way(1)) == 3
    for each in (made, fresh):
        each.add(replace(layer(2), layer_idx=1))
    for layer_idx in (1, 2, 0, 1):
        found = []
        for each in (made, fresh):
            torch.manual_seed(0)  # the CPUs' part
            call = Call(layer_idx)
            found.append(call.on(each, layer_idx, list(range(12))))
        assert torch.equal(*found)
        weights = call.want(2 if layer_idx == 1 else layer_idx)
        assert reference.relative_error(found[0].numpy(), weights) < 1e-5


def test_a_layer_is_forgotten_once_nothing_reads_it(streams: Streams) -> None:
    """Its memory may be overwritten or freed next: copies must have ended, then CUDA forgets it."""
    made = card(streams)
    events: list[str] = []

    class Slow(PackedLayer):
        def copy(self, expert: int, slot: torch.Tensor) -> None:
            time.sleep(0.05)
            super().copy(expert, slot)
            events.append("read")

    found = layer(1)
    registered = Registered(lambda _: events.append("unregistered"))
    registered.add(found.slices[0].numpy())
    fields = found.layer_idx, found.slices, found.where, found.held, found.tables
    slow = Slow(*fields, registered=registered)
    made.add(slow)
    Call(0).on(made, 0)
    assert made.has(slow)
    made.forget(1)
    assert not made.has(slow)
    assert events == [*3 * ["read"], "unregistered"]
    made.forget(1)
    made.add(found)
    assert events.count("unregistered") == 1


def test_a_copy_that_fails_is_told_and_leaves_the_next_call_whole() -> None:
    made = card(direct_streams())
    broken = layer(0)
    calls = 0

    class Failing(PackedLayer):
        def copy(self, expert: int, slot: torch.Tensor) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise RuntimeError("the bus is gone")
            super().copy(expert, slot)

    fields = broken.layer_idx, broken.slices, broken.where, broken.held, broken.tables
    made.add(Failing(*fields))
    with pytest.raises(RuntimeError, match="the bus is gone"):
        Call(0).on(made, 0)
    for _ in range(2):
        call = Call(1)
        found = call.on(made, 0)
        assert reference.relative_error(found.numpy(), call.want(0)) < 1e-5


def test_no_slot_is_in_use_once_a_failure_is_told(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = card(streams)
    unpack, read = made._unpack, []

    def slow(layer: PackedLayer, slot: torch.Tensor) -> None:
        time.sleep(0.1)
        unpack(layer, slot)
        read.append(slot)

    def failing() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(made, "_unpack", slow)
    monkeypatch.setattr(made._ring, "give_back", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        Call(0).on(made, 0)
    assert len(read) == 1


def test_both_sides_are_learned_from() -> None:
    made = card(direct_streams())
    for seed in range(15):
        Call(seed, tokens=8).on(made, 2)
        made.learn_cpu(2.0, np.full(12, 10))
    assert 1e-6 < made.costs.card < 1.0
    assert made.costs.cpu_seconds(np.full(12, 10)) == pytest.approx(2.0, rel=0.1)
    assert made.totals.cpu_seconds == pytest.approx(30.0)
    assert made.totals.card_seconds > 0
