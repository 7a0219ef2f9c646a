"""A layer cut into slices for NUMA nodes: what decides its bits, and what they must be."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kt_kernel.wrapper
from kt_kernel import KTMoEWrapper, _ext, packed
from kt_kernel.engine import target_name
from kt_kernel.host.cpus import allowed_cpus
from tests import reference
from tests.kt_kernel.layer_files import write_layer
from tests.layers import RandomLayer, random_batch, shared_layer
from tests.shapes import LayerShape

#: Five units of 64: no number of slices but one and five cuts it evenly.
SHAPE = LayerShape(4, 2, 128, 320)
#: Calls that the workers get quantised, and such that they quantise.
BATCHES = [1, 8, 9, 40]

CPU = allowed_cpus()[0].id
#: Workers of each group; they may share a CPU here, which changes the time and nothing else.
GROUPS = {
    1: ([1], [2], [5]),
    2: ([1], [1, 1], [3, 1], [1, 4], [3]),
    3: ([1], [1, 1, 1], [1, 2, 3], [2, 1]),
}


def use_engine(monkeypatch: pytest.MonkeyPatch, workers: list[int], slices: int) -> None:
    cpus = [cpu.id for cpu in allowed_cpus()]
    groups = [[cpus[i % len(cpus)] for i in range(count)] for count in workers]
    engine = _ext.Engine(groups, slices, target_name())
    monkeypatch.setattr(kt_kernel.wrapper, "shared_engine", lambda threads, pools: engine)


@pytest.mark.parametrize("slices", GROUPS)
def test_threads_do_not_change_bits(
    monkeypatch: pytest.MonkeyPatch, method: str, slices: int
) -> None:
    layer = shared_layer(SHAPE)
    results = []
    for workers in GROUPS[slices]:
        use_engine(monkeypatch, workers, slices)
        wrapper = layer.wrapper(method)
        results.append([wrapper.forward(*random_batch(SHAPE, n), 0) for n in BATCHES])
    for workers, found in zip(GROUPS[slices], results, strict=True):
        for batch, want in zip(found, results[0], strict=True):
            assert torch.equal(batch, want), workers


@pytest.mark.parametrize("slices", [2, 3, 5])
def test_slices_match_definition(target: str, method: str, slices: int) -> None:
    layer = shared_layer(SHAPE)
    wrapper = layer.wrapper(method, threadpool_count=slices)
    for tokens in BATCHES:
        x, ids, weights = random_batch(SHAPE, tokens)
        found = wrapper.forward(x, ids, weights, 0)
        experts = layer.packed(method)
        want = reference.moe(x.numpy(), ids.numpy(), weights.numpy(), experts, True, slices)
        reference.assert_same(found, want)


def write_slice(
    source: Path, folder: Path, layout: packed.PackedLayout, begin: int, end: int
) -> None:
    """The file of a layer that has only columns [begin, end) of the intermediate."""
    cut = packed.PackedLayout(layout.num_experts, layout.hidden_size, end - begin, layout.method)
    codes_k = 8 if layout.has_tables else 4
    tensors = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            whole, (projection, _, part) = file.get_tensor(name), name.partition(".")
            if projection in ("gate", "up"):
                rows = 1 if part == "scales" else packed.PANEL_ROWS
                whole = whole[:, begin // rows : end // rows]
            elif projection == "down" and part != "scales":
                k = codes_k if part == "codes" else packed.METHODS[layout.method].block_k
                whole = whole[:, :, begin // k : end // k]
            tensors[name] = whole.contiguous()
    folder.mkdir()
    save_file(tensors, folder / packed.layer_file_name(0), cut.metadata(0))


@pytest.mark.parametrize("slices", [1, 2, 3, 5])
def test_slices_are_layers_added_up(tmp_path: Path, target: str, method: str, slices: int) -> None:
    """To the bit: a sliced layer is the float32 sum of layers that each have a slice's weights."""
    layout = packed.PackedLayout(
        SHAPE.num_experts,
        SHAPE.hidden_size,
        SHAPE.intermediate_size,
        method,
    )
    source = write_layer(tmp_path / "whole", layout, 0)

    def loaded(folder: Path, width: int, pools: int) -> KTMoEWrapper:
        wrapper = KTMoEWrapper(
            layer_idx=0,
            num_experts=SHAPE.num_experts,
            num_experts_per_tok=SHAPE.top_k,
            hidden_size=SHAPE.hidden_size,
            moe_intermediate_size=width,
            cpuinfer_threads=2,
            threadpool_count=pools,
            weight_path=str(folder),
            method=packed.METHODS[method].kt_method,
        )
        wrapper.load_weights(torch.tensor([2, 0, 3, 1]))
        return wrapper

    bounds = reference.slice_bounds(SHAPE.intermediate_size, slices)
    assert len(bounds) == slices
    parts = []
    for begin, end in bounds:
        write_slice(source, tmp_path / f"{begin}", layout, begin, end)
        parts.append(loaded(tmp_path / f"{begin}", end - begin, 1))
    sliced = loaded(tmp_path / "whole", SHAPE.intermediate_size, slices)
    for tokens in BATCHES:
        batch = random_batch(SHAPE, tokens)
        want = parts[0].forward(*batch, 0)
        for part in parts[1:]:
            want = want + part.forward(*batch, 0)
        assert torch.equal(sliced.forward(*batch, 0), want), tokens


def test_a_small_layer_has_fewer_slices(method: str) -> None:
    shape = LayerShape(4, 2, 128, 64)
    layer, batch = RandomLayer(shape), random_batch(shape, 12)
    want = layer.wrapper(method).forward(*batch, 0)
    assert torch.equal(layer.wrapper(method, threadpool_count=3).forward(*batch, 0), want)


def test_an_engine_needs_a_slice_for_each_group() -> None:
    with pytest.raises(ValueError, match="an engine of 2 groups of workers needs as many slices"):
        _ext.Engine([[CPU], [CPU]], 1, "scalar")
    with pytest.raises(ValueError, match="a group of workers needs at least one CPU"):
        _ext.Engine([[CPU], []], 2, "scalar")


def test_calls_reuse_their_memory() -> None:
    """After the first calls no memory is fetched from the system, which page faults would show."""
    shape = LayerShape(4, 1, 1024, 64)
    wrapper = RandomLayer(shape).wrapper("int8", threadpool_count=2)
    # From 32 MiB on the C library never keeps memory that is freed.
    batches = [random_batch(shape, tokens) for tokens in (9000, 1, 300, 8)]

    def faults_of(rounds: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for batch in batches * rounds:
            wrapper.forward(*batch, 0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of(2)
    assert faults_of(3) < 1000  # the outputs alone have 9000 pages a round


def test_outputs_are_not_shared() -> None:
    """A result stays what it is while anything refers to it, however many calls follow."""
    shape = LayerShape(4, 2, 1024, 64)
    wrapper = RandomLayer(shape).wrapper("int8")
    batches = [random_batch(shape, 100, seed) for seed in range(4)]
    want = [wrapper.forward(*batch, 0).clone() for batch in batches]
    held = [wrapper.forward(*batch, 0)[10:20] for batch in batches]
    wrapper.forward(*random_batch(shape, 100, 9), 0)
    for found, whole in zip(held, want, strict=True):
        assert torch.equal(found, whole[10:20])
