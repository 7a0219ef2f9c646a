"""A layer's counts are the checkpoint's experts', wherever they were put."""

from __future__ import annotations

import numpy as np
import torch

from kt_kernel import KTMoEWrapper
from tests.layers import RandomLayer, random_batch
from tests.shapes import LAYERS


def test_counts_follow_experts_to_their_slots() -> None:
    shape = LAYERS[0]
    layer = RandomLayer(shape)
    wrapper: KTMoEWrapper = layer.wrapper("int4", num_gpu_experts=2)
    experts = torch.arange(shape.num_experts).roll(3)
    wrapper.load_weights_from_tensors(layer.gate, layer.up, layer.down, experts)
    x, slots, weights = random_batch(shape, 12)
    wrapper.forward(x, slots, weights, 0)
    want = np.bincount(experts[slots.long()].flatten().numpy(), minlength=shape.num_experts)
    np.testing.assert_array_equal(wrapper.expert_counts(), want)
    assert len(set(want.tolist())) > 1
    assert wrapper.model.num_experts == shape.num_experts
