"""Tensors on a GPU: the same result as on the CPU, and a clear refusal inside a graph capture."""

from __future__ import annotations

import pytest
import torch

from kt_kernel.errors import UserError
from tests.layers import RandomLayer, random_batch
from tests.shapes import LAYERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPE = LAYERS[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_as_on_the_cpu(method: str, dtype: torch.dtype) -> None:
    wrapper = RandomLayer(SHAPE).wrapper(method, num_gpu_experts=1)
    for tokens in (1, 7, 300, 2):
        x, ids, weights = random_batch(SHAPE, tokens, tokens, dtype)
        want = wrapper.forward(x, ids, weights, 0)
        on_gpu = [t.cuda() for t in (x, ids, weights)]
        stream = torch.cuda.current_stream().cuda_stream
        wrapper.submit_forward(*on_gpu, stream)
        on_gpu[1].fill_(-1)  # as SGLang masks ids in place, on the same stream
        found = wrapper.sync_forward(on_gpu[0], stream)
        assert found.is_cuda
        assert torch.equal(found.cpu(), want)


def test_graph_capture_is_refused() -> None:
    wrapper = RandomLayer(SHAPE).wrapper("int4")
    batch = [t.cuda() for t in random_batch(SHAPE, 2)]
    with (
        pytest.raises(UserError, match="--disable-decode-cuda-graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        wrapper.submit_forward(*batch, torch.cuda.current_stream().cuda_stream)
