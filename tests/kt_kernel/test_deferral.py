"""Experts deferred into the next MoE layer's output, against a plain sum over several layers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kt_kernel import KTMoEWrapper
from kt_kernel.calls import LEFT
from kt_kernel.errors import UserError
from tests import reference
from tests.kt_kernel.layer_files import LAYOUTS, write_layer
from tests.layers import RandomLayer, random_batch
from tests.shapes import LayerShape

SHAPE = LayerShape(16, 8, 256, 64)
FIRST = 3
COUNT = 4
RESIDENT = 2

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def nothing_deferred(layers: list[RandomLayer]) -> Iterator[None]:
    """Whatever a test leaves behind, a call of the first layer drops."""
    yield
    layers[0].wrapper("int8", layer_idx=0).forward(*random_batch(SHAPE, 1), 0)
    assert KTMoEWrapper._deferred is None


@pytest.fixture(scope="module")
def layers() -> list[RandomLayer]:
    return [RandomLayer(SHAPE, seed) for seed in range(COUNT)]


def wrappers(layers: list[RandomLayer], deferred: int | None) -> list[KTMoEWrapper]:
    """The layers as SGLang makes them: the last one defers nothing."""
    return [
        layer.wrapper(
            "int8",
            layer_idx=FIRST + i,
            num_gpu_experts=RESIDENT,
            max_deferred_experts_per_token=deferred if i < COUNT - 1 else 0,
        )
        for i, layer in enumerate(layers)
    ]


def batch(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch with padding: the last of a token's experts, and a whole token."""
    x, ids, weights = random_batch(SHAPE, tokens, seed, dtype)
    ids[::3, 5] = -1
    if tokens > 2:
        ids[-1] = -1
    return x, ids, weights


def split(ids: torch.Tensor, weights: torch.Tensor, deferred: int) -> tuple[torch.Tensor, ...]:
    """The ids of now and of later, from the definition."""
    heaviest = weights.sort(descending=True, stable=True).indices[:, : SHAPE.top_k - deferred]
    needed = set(ids.gather(1, heaviest).flatten().tolist()) - {-1}
    is_now = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, heaviest, True)
    is_now |= torch.tensor([[int(i) in needed for i in row] for row in ids])
    return ids.where(is_now, -1), ids.where(~is_now, -1)


def run(wrapper: KTMoEWrapper, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A call as SGLang makes it, which overwrites the ids on the way."""
    ids = ids.clone()
    wrapper.submit_forward(x, ids, w, 0)
    ids.fill_(-1)
    return wrapper.sync_forward(x, 0)


@pytest.mark.parametrize("deferred", [1, 3, 8])
def test_the_rest_arrives_one_layer_later(layers: list[RandomLayer], deferred: int) -> None:
    """Each layer's input is the output before it, over passes of changing size."""
    called = wrappers(layers, deferred)
    for tokens in (1, 7, 30, 2):
        x = batch(tokens, tokens)[0]
        late = np.zeros(x.shape)
        for i, (wrapper, layer) in enumerate(zip(called, layers, strict=True)):
            _, ids, weights = batch(tokens, 10 * tokens + i)
            now, later = split(ids, weights, deferred if i < COUNT - 1 else 0)
            experts = layer.packed("int8")

            def plain(
                chosen: torch.Tensor,
                x: torch.Tensor = x,
                weights: torch.Tensor = weights,
                experts: dict[int, reference.Expert] = experts,
            ) -> np.ndarray:
                on_cpu = torch.where(chosen < RESIDENT, -1, chosen)
                return reference.moe(x.numpy(), on_cpu.numpy(), weights.numpy(), experts, True)

            found = run(wrapper, x, ids, weights)
            want = plain(now) + late
            error = np.abs(found.numpy() - want).mean()
            assert error <= reference.ONE_STEP * np.abs(want).mean()
            late = plain(later)
            x = x + found / 4
        assert not late.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_parts_are_the_bits_of_whole_calls(
    layers: list[RandomLayer], dtype: torch.dtype
) -> None:
    """Which are added before they are rounded."""
    deferring, plain = wrappers(layers, 3), wrappers(layers, None)
    for tokens in (5, 40):
        late = torch.zeros(tokens, SHAPE.hidden_size)
        wanted = []
        for i, wrapper in enumerate(plain):
            x, ids, weights = batch(tokens, i, dtype)
            now, later = split(ids, weights, 3 if i < COUNT - 1 else 0)
            wanted.append((run(wrapper, x.float(), now, weights) + late).to(dtype))
            late = run(wrapper, x.float(), later, weights)
        for i, wrapper in enumerate(deferring):
            assert torch.equal(run(wrapper, *batch(tokens, i, dtype)), wanted[i])


def test_no_more_than_all_are_deferred(layers: list[RandomLayer]) -> None:
    """The setting knows no model: it may be larger than the model's top-k."""
    want = [run(wrapper, *batch(3, i)) for i, wrapper in enumerate(wrappers(layers, SHAPE.top_k))]
    for i, wrapper in enumerate(wrappers(layers, SHAPE.top_k + 1)):
        assert torch.equal(run(wrapper, *batch(3, i)), want[i])


def test_of_equal_weights_the_later_are_deferred(layers: list[RandomLayer]) -> None:
    first, plain = wrappers(layers, 3)[0], wrappers(layers, None)[0]
    x, ids, _ = random_batch(SHAPE, 1)
    for weights, later in (([1.0] * 8, [5, 6, 7]), ([2, 1, 2, 1, 2, 1, 1, 2], [3, 5, 6])):
        given = torch.tensor([weights], dtype=torch.float32)
        now = ids.clone()
        now[:, later] = -1
        assert torch.equal(run(first, x, ids, given), run(plain, x, now, given))
    LEFT.swap(None)


def test_none_is_exact(layers: list[RandomLayer]) -> None:
    for number in (None, 0):
        for i, wrapper in enumerate(wrappers(layers, number)):
            x, ids, weights = batch(9, i)
            want = layers[i].wrapper("int8", num_gpu_experts=RESIDENT).forward(x, ids, weights, 0)
            assert torch.equal(run(wrapper, x, ids, weights), want)


def test_the_last_layer_of_a_folder_defers_nothing(tmp_path: Path) -> None:
    """SGLang 0.5.16 asks it to; what it deferred would be lost, and no second graph captured."""
    layout = LAYOUTS["int8"]
    deferring = []
    for index in (FIRST, FIRST + 1):
        write_layer(tmp_path, layout, index)
    for index in (FIRST, FIRST + 1):
        wrapper = KTMoEWrapper(
            index,
            layout.num_experts,
            2,
            layout.hidden_size,
            layout.intermediate_size,
            num_gpu_experts=0,
            cpuinfer_threads=1,
            weight_path=str(tmp_path),
            method="AMXINT8",
            max_deferred_experts_per_token=1,
        )
        wrapper.load_weights(torch.arange(layout.num_experts))
        x, ids, weights = torch.ones(1, 256), torch.tensor([[0, 1]]), torch.ones(1, 2)
        wrapper.forward(x, ids.int(), weights)
        deferring.append(KTMoEWrapper._deferred is not None)
    assert deferring == [True, False]


def test_a_pass_that_was_not_finished_leaves_nothing(layers: list[RandomLayer]) -> None:
    called = wrappers(layers, 2)
    want = [run(wrapper, *batch(6, i)) for i, wrapper in enumerate(called)]
    for stop in range(1, COUNT):
        for wrapper in called[:stop]:
            run(wrapper, *batch(33, 77))
        found = [run(wrapper, *batch(6, i)) for i, wrapper in enumerate(called)]
        assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


def test_another_batch_in_between_is_refused(layers: list[RandomLayer]) -> None:
    called = wrappers(layers, 2)
    run(called[0], *batch(6, 1))
    with pytest.raises(UserError, match=r"layer 4 is called with 5 tokens of 256 after .* 6 t"):
        called[1].submit_forward(*batch(5, 1), 0)
    # That one is forgotten, too.
    want = layers[1].wrapper("int8", num_gpu_experts=RESIDENT).forward(*batch(5, 1), 0)
    assert torch.equal(run(wrappers(layers, None)[1], *batch(5, 1)), want)


def test_a_bad_id_among_the_deferred_is_refused(layers: list[RandomLayer]) -> None:
    called = wrappers(layers, 2)
    x, ids, weights = batch(6, 1)
    slot = int(weights[0].argmin())
    ids[0, slot] = SHAPE.num_experts
    with pytest.raises(UserError, match="layer 3: expert id 16 of token 0"):
        called[0].submit_forward(x, ids, weights, 0)
    want = [run(w, *batch(6, i)) for i, w in enumerate(wrappers(layers, 2))]
    assert torch.equal(run(called[0], *batch(6, 0)), want[0])


def test_a_fork_does_not_take_what_its_parent_left(layers: list[RandomLayer]) -> None:
    """Its workers are not there: a call that waited for them would never end."""
    first, second = wrappers(layers, 6)[:2]
    first.forward(*batch(5, 1))
    assert LEFT.deferred is not None
    child = os.fork()
    if child == 0:
        os._exit(LEFT.deferred is not None)
    assert os.waitpid(child, 0)[1] == 0
    second.forward(*batch(5, 1))
    assert LEFT.deferred is not None  # its own


def test_a_call_that_has_none_to_defer_makes_no_second_one(layers: list[RandomLayer]) -> None:
    """As nearly all of many tokens: each expert is needed at once for one of them; and padding."""
    first, plain = wrappers(layers, 2)[0], wrappers(layers, None)[0]
    engine = first._weights.engine
    x, ids, weights = random_batch(SHAPE, 16)
    ids = (torch.arange(16)[:, None] + torch.arange(8)).remainder(16).int()
    for chosen in (ids, torch.full_like(ids, -1)):
        want = run(plain, x, chosen, weights)
        before = engine.totals["calls"]
        assert torch.equal(run(first, x, chosen, weights), want)
        assert LEFT.deferred is None
        assert engine.totals["calls"] == before + 1


def test_threads_do_not_take_what_others_left(layers: list[RandomLayer]) -> None:
    """Two passes at once, of the same shape: each gets its own deferred experts."""
    first, second = wrappers(layers, 6)[:2]
    inputs = [batch(5, seed) for seed in (1, 2)]
    want = [[wrapper.forward(*b) for wrapper in (first, second)][1] for b in inputs]
    LEFT.swap(None)
    first.forward(*inputs[0])
    with ThreadPoolExecutor(1) as other:
        other.submit(first.forward, *inputs[1]).result()
        assert torch.equal(second.forward(*inputs[0]), want[0])
        assert torch.equal(other.submit(second.forward, *inputs[1]).result(), want[1])
        other.submit(LEFT.swap, None).result()


@pytest.mark.gpu
def test_on_a_gpu(layers: list[RandomLayer]) -> None:
    """The bits of the CPU, called directly and replayed by a graph with other inputs."""
    called = wrappers(layers, 2)
    want = [run(wrapper, *batch(6, i)) for i, wrapper in enumerate(called)]
    inputs = [tuple(t.cuda() for t in batch(6, i)) for i in range(COUNT)]

    def all_layers() -> list[torch.Tensor]:
        outputs = []
        for wrapper, (x, ids, weights) in zip(called, inputs, strict=True):
            stream = torch.cuda.current_stream().cuda_stream
            wrapper.submit_forward(x, ids, weights, stream)
            outputs.append(wrapper.sync_forward(x, stream))
        return outputs

    assert all(torch.equal(f.cpu(), w) for f, w in zip(all_layers(), want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_layers()
    for seed in (0, 50):
        for i, tensors in enumerate(inputs):
            for tensor, values in zip(tensors, batch(6, seed + i), strict=True):
                tensor.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        want = [run(wrapper, *batch(6, seed + i)) for i, wrapper in enumerate(called)]
        assert all(torch.equal(f.cpu(), w) for f, w in zip(captured, want, strict=True))
