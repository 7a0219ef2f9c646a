"""A layer's result on every target: against the definition, and against each other."""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np
import pytest
import torch

from tests import reference
from tests.conftest import INTEGER_TARGETS
from tests.layers import RandomLayer, random_batch, shared_layer
from tests.shapes import LAYERS, MANY_TOKENS, TOKENS, LayerShape

SHAPE = LAYERS[0]


def expected(
    layer: RandomLayer,
    method: str,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    skip: Collection[int] = (),
) -> np.ndarray:
    experts = {e: w for e, w in layer.packed(method).items() if e not in skip}
    return reference.moe(x.float().numpy(), ids.numpy(), weights.numpy(), experts, True)


@functools.cache
def definition(shape: LayerShape, method: str, tokens: int) -> np.ndarray:
    """What each target's result must be, for the batch whose seed is its number of tokens."""
    return expected(shared_layer(shape), method, *random_batch(shape, tokens, seed=tokens))


@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_matches_definition(target: str, method: str, shape: LayerShape) -> None:
    wrapper = shared_layer(shape).wrapper(method)
    for tokens in TOKENS:
        x, ids, weights = random_batch(shape, tokens, seed=tokens)
        found = wrapper.forward(x, ids, weights, 0)
        assert found.dtype == torch.float32
        assert found.shape == x.shape
        reference.assert_same(found, definition(shape, method, tokens))


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_targets_agree_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, method: str, shape: LayerShape, dtype: torch.dtype
) -> None:
    assert len(INTEGER_TARGETS) > 1, "only one target runs here: nothing was compared"
    layer = shared_layer(shape, student_t=True)
    results = {}
    for target in INTEGER_TARGETS:
        monkeypatch.setenv("KT_TARGET", target)
        wrapper = layer.wrapper(method)
        results[target] = [
            wrapper.forward(*random_batch(shape, tokens, tokens, dtype), 0) for tokens in TOKENS
        ]
    for target in INTEGER_TARGETS:
        for found, want in zip(results[target], results["scalar"], strict=True):
            assert torch.equal(found, want), target


def test_reference_target_is_exact(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Float activations: what remains is float32 rounding of the intermediate."""
    monkeypatch.setenv("KT_TARGET", "reference")
    layer = shared_layer(SHAPE)
    x, ids, weights = random_batch(SHAPE, 9)
    found = layer.wrapper(method).forward(x, ids, weights, 0)
    want = reference.moe(x.numpy(), ids.numpy(), weights.numpy(), layer.packed(method), False)
    assert reference.relative_error(found, want) < 2e-7


# Error of the whole layer against the unpacked weights; docs/weight-format.md has the table.
@pytest.mark.parametrize(
    ("method", "student_t", "bound"),
    [
        ("int4", False, 0.150),
        ("int4", True, 0.180),
        ("int4-4x8", False, 0.132),
        ("int4-4x8", True, 0.158),
        ("int8", False, 0.030),
        ("int8", True, 0.042),
    ],
)
def test_format_error(method: str, student_t: bool, bound: float) -> None:
    shape = LayerShape(2, 2, 2048, 1024)
    layer = shared_layer(shape, student_t)
    x, ids, weights = random_batch(shape, 16)
    found = layer.wrapper(method).forward(x, ids, weights, 0)
    want = reference.moe(x.numpy(), ids.numpy(), weights.numpy(), layer.original(), False)
    error = reference.relative_error(found, want)
    assert bound / 2 < error < bound


def with_outliers(x: torch.Tensor, channels: int, factor: float) -> torch.Tensor:
    """The batch with some channels much larger, as the hidden states of large models have them."""
    chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(5))[:channels]
    x = x.clone()
    x[:, chosen] *= factor
    return x


@pytest.mark.parametrize(("channels", "factor"), [(1, 1e30), (5, 50), (16, 20)])
def test_outliers_match_definition(target: str, method: str, channels: int, factor: float) -> None:
    shape = LayerShape(4, 2, 1088, 320)
    layer = shared_layer(shape)
    wrapper = layer.wrapper(method)
    for tokens in (1, 40):
        x, ids, weights = random_batch(shape, tokens)
        x = with_outliers(x, channels, factor) / max(1, factor / 1e4)
        found = wrapper.forward(x, ids, weights, 0)
        reference.assert_same(found, expected(layer, method, x, ids, weights))


@pytest.mark.parametrize(
    ("method", "bound"), [("int4", 0.150), ("int4-4x8", 0.132), ("int8", 0.030)]
)
def test_format_error_with_outliers(method: str, bound: float) -> None:
    """A few channels x 50 cost no accuracy: with one scale for all of a row, INT8 is at 0.16."""
    shape = LayerShape(2, 2, 2048, 1024)
    layer = shared_layer(shape)
    x, ids, weights = random_batch(shape, 16)
    x = with_outliers(x, 4, 50)
    found = layer.wrapper(method).forward(x, ids, weights, 0)
    want = reference.moe(x.numpy(), ids.numpy(), weights.numpy(), layer.original(), False)
    assert reference.relative_error(found, want) < bound


def test_outliers_of_targets_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Outliers in some rows only, bf16 and float32, values that nothing is left beside included."""
    shape = LayerShape(4, 2, 1088, 320)
    layer = shared_layer(shape)
    x, ids, weights = random_batch(shape, 70)
    x[::3] = with_outliers(x[::3], 5, 300)
    x[7] = 0
    x[7, 100] = 3
    x[8] = 0
    x[9] *= 1e-36
    x[10, 5] = torch.inf
    results = []
    for name in INTEGER_TARGETS:
        monkeypatch.setenv("KT_TARGET", name)
        wrapper = layer.wrapper(method)
        results.append(
            [wrapper.forward(x.to(d), ids, weights, 0) for d in (torch.float32, torch.bfloat16)]
        )
    for found in results[1:]:
        for mine, want in zip(found, results[0], strict=True):
            assert torch.equal(mine.nan_to_num(), want.nan_to_num())
            assert torch.equal(mine.isnan(), want.isnan())
    assert results[0][0][10].isnan().all()


def test_padding_and_gpu_experts_are_skipped(target: str, method: str) -> None:
    layer = shared_layer(SHAPE)
    wrapper = layer.wrapper(method, num_gpu_experts=3)
    x, ids, weights = random_batch(SHAPE, 33)
    ids[5, 1] = -1
    ids[6] = -1
    ids[7] = torch.tensor([0, 2])
    found = wrapper.forward(x, ids, weights, 0)
    want = expected(layer, method, x, ids, weights, skip=(0, 1, 2))
    reference.assert_same(found, want)
    assert torch.all(found[6] == 0)
    assert torch.all(found[7] == 0)


def test_mask_may_change_between_calls(method: str) -> None:
    layer = shared_layer(SHAPE)
    wrapper = layer.wrapper(method, gpu_experts_mask=torch.arange(8) >= 6)
    x, ids, weights = random_batch(SHAPE, 20)
    for gpu in ((6, 7), (0, 3), ()):
        wrapper.gpu_experts_mask.copy_(torch.isin(torch.arange(8), torch.tensor(gpu)))
        found = wrapper.forward(x, ids, weights, 0)
        want = expected(layer, method, x, ids, weights, skip=gpu)
        reference.assert_same(found, want)
    wrapper.gpu_experts_mask = torch.arange(8) == 1
    found = wrapper.forward(x, ids, weights, 0)
    reference.assert_same(found, expected(layer, method, x, ids, weights, skip=(1,)))


@pytest.mark.parametrize("tokens", MANY_TOKENS)
def test_all_tokens_on_one_expert(
    monkeypatch: pytest.MonkeyPatch, target: str, method: str, tokens: int
) -> None:
    shape = LayerShape(8, 1, 1088, 192)
    layer = shared_layer(shape)
    x, _, weights = random_batch(shape, tokens)
    ids = torch.full((tokens, 1), 5, dtype=torch.int32)
    found = layer.wrapper(method).forward(x, ids, weights, 0)
    reference.assert_same(found, expected(layer, method, x, ids, weights))
    monkeypatch.setenv("KT_TARGET", "scalar")
    assert torch.equal(found, layer.wrapper(method).forward(x, ids, weights, 0))


def test_no_tokens_and_nothing_for_the_cpu(target: str) -> None:
    wrapper = shared_layer(SHAPE).wrapper("int4")
    x, ids, weights = random_batch(SHAPE, 4)
    assert wrapper.forward(x[:0], ids[:0], weights[:0], 0).shape == (0, SHAPE.hidden_size)
    assert torch.all(wrapper.forward(x, torch.full_like(ids, -1), weights, 0) == 0)


@pytest.mark.parametrize("tokens", [1, 50, 2000], ids="{} tokens".format)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_inputs_may_be_overwritten_after_submit(method: str, tokens: int, busy: bool) -> None:
    """SGLang masks topk_ids in place between submit and sync. Workers that are idle read very many
    tokens from the caller's memory, before submit returns; others are copied."""
    layer = shared_layer(SHAPE)
    wrapper, other = layer.wrapper(method), layer.wrapper(method)
    x, ids, weights = random_batch(SHAPE, tokens)
    want = wrapper.forward(x.clone(), ids.clone(), weights.clone(), 0)
    if busy:
        other.submit_forward(*random_batch(SHAPE, 2000), 0)
    wrapper.submit_forward(x, ids, weights, 0)
    x.fill_(float("nan"))
    ids.fill_(-1)
    weights.zero_()
    assert torch.equal(wrapper.sync_forward(x, 0), want)


def test_layers_share_the_threads_and_alternate(method: str) -> None:
    """Growing and shrinking batches on two layers with both calls pending at once."""
    other = LayerShape(5, 3, 128, 320)
    first, second = RandomLayer(SHAPE, 1), RandomLayer(other, 2)
    a, b = first.wrapper(method), second.wrapper(method)
    for tokens in (1, 70, 3, 200, 1):
        batch_a, batch_b = random_batch(SHAPE, tokens), random_batch(other, 2 * tokens)
        a.submit_forward(*batch_a, 0)
        b.submit_forward(*batch_b, 0)
        found_b, found_a = b.sync_forward(batch_b[0], 0), a.sync_forward(batch_a[0], 0)
        assert torch.equal(found_a, a.forward(*batch_a, 0))
        reference.assert_same(found_a, expected(first, method, *batch_a))
        reference.assert_same(found_b, expected(second, method, *batch_b))


def test_int64_ids_and_strided_inputs() -> None:
    wrapper = shared_layer(SHAPE).wrapper("int8")
    x, ids, weights = random_batch(SHAPE, 6)
    want = wrapper.forward(x, ids, weights, 0)
    wide = torch.stack([x, x], dim=1).reshape(6, -1)[:, : SHAPE.hidden_size]
    assert not wide.is_contiguous()
    assert torch.equal(wrapper.forward(wide, ids.long(), weights.t().contiguous().t(), 0), want)


def test_expert_map_moves_experts(method: str) -> None:
    layer = shared_layer(SHAPE)
    wrapper = layer.wrapper(method)
    batch = random_batch(SHAPE, 12)
    want = wrapper.forward(*batch, 0)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    wrapper.load_weights_from_tensors(layer.gate, layer.up, layer.down, order)
    moved = torch.argsort(order).int()[batch[1].long()]
    found = wrapper.forward(batch[0], moved, batch[2], 0)
    # Sums over experts run in slot order, which the map changes.
    assert reference.relative_error(found, want.double().numpy()) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_show_in_their_row_only(target: str, value: float) -> None:
    wrapper = shared_layer(SHAPE).wrapper("int4")
    x, ids, weights = random_batch(SHAPE, 10)
    want = wrapper.forward(x, ids, weights, 0)
    x[4, 77] = value
    found = wrapper.forward(x, ids, weights, 0)
    assert torch.all(torch.isnan(found[4]))
    assert torch.equal(found[:4], want[:4])
    assert torch.equal(found[5:], want[5:])


def test_zero_activations_give_zero(target: str, method: str) -> None:
    wrapper = shared_layer(SHAPE).wrapper(method)
    x, ids, weights = random_batch(SHAPE, 3)
    assert torch.all(wrapper.forward(torch.zeros_like(x), ids, weights, 0) == 0)


def test_repeated_calls_give_the_same_bits(method: str) -> None:
    wrapper = shared_layer(SHAPE).wrapper(method)
    batch = random_batch(SHAPE, 5)
    want = wrapper.forward(*batch, 0)
    assert all(torch.equal(wrapper.forward(*batch, 0), want) for _ in range(300))
