"""How often each expert was routed to: against numpy, on the GPU or here, while calls run, too."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kt_kernel import KTMoEWrapper
from kt_kernel.errors import UserError
from tests.layers import random_batch, shared_layer
from tests.shapes import LAYERS

SHAPE = LAYERS[0]


def counts_of(ids: torch.Tensor) -> np.ndarray:
    """[E] how many of the ids are each expert's; padding is none's."""
    return np.bincount(ids[ids >= 0].numpy(), minlength=SHAPE.num_experts)


def ragged_ids(tokens: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[T, k] of any expert, now and then twice for a token, and padding."""
    generator = torch.Generator().manual_seed(tokens)
    size = (tokens, SHAPE.top_k)
    return torch.randint(-1, SHAPE.num_experts, size, dtype=dtype, generator=generator)


def run(wrapper: KTMoEWrapper, ids: torch.Tensor) -> None:
    x, _, weights = random_batch(SHAPE, len(ids))
    wrapper.forward(x, ids, weights, 0)


@pytest.mark.parametrize("deferred", [0, 1])
def test_counts_are_numpys(deferred: int) -> None:
    """Few tokens and many, padding, GPU experts, experts that go into the next layer's output."""
    wrapper = shared_layer(SHAPE).wrapper(
        "int4", num_gpu_experts=3, max_deferred_experts_per_token=deferred
    )
    want = np.zeros(SHAPE.num_experts, np.int64)
    for tokens, dtype in ((1, torch.int32), (7, torch.int64), (40, torch.int32), (0, torch.int32)):
        ids = ragged_ids(tokens, dtype)
        run(wrapper, ids)  # the last call ends after what the ones before it have deferred
        want += counts_of(ids)
    found = wrapper._weights.layer.token_counts
    assert found.dtype == np.int64
    assert (want[:3] > 0).all()
    np.testing.assert_array_equal(found, want)
    found[:] = 0
    np.testing.assert_array_equal(wrapper._weights.layer.token_counts, want)


def test_a_refused_call_is_not_counted() -> None:
    wrapper = shared_layer(SHAPE).wrapper("int4")
    ids = ragged_ids(3)
    ids[2, 0] = SHAPE.num_experts
    with pytest.raises(UserError, match="outside"):
        run(wrapper, ids)
    assert not wrapper._weights.layer.token_counts.any()


def test_counts_only_grow_while_calls_run() -> None:
    wrapper = shared_layer(SHAPE).wrapper("int4")
    ids, rounds = ragged_ids(9), 300

    def call() -> None:
        for _ in range(rounds):
            run(wrapper, ids)

    caller = threading.Thread(target=call)
    caller.start()
    before, reads = wrapper._weights.layer.token_counts, 0
    while caller.is_alive():
        now = wrapper._weights.layer.token_counts
        assert (now >= before).all()
        before, reads = now, reads + 1
    caller.join()
    assert reads > 1, "the calls were over at once: nothing was tried"
    np.testing.assert_array_equal(wrapper._weights.layer.token_counts, rounds * counts_of(ids))
