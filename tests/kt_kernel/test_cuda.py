"""Tensors on a GPU: the same result as on the CPU, called directly and replayed by a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kt_kernel import _ext
from kt_kernel.host.cpus import allowed_cpus
from kt_kernel.stream import stream_context
from tests.layers import RandomLayer, random_batch
from tests.shapes import LAYERS

pytestmark = pytest.mark.gpu

SHAPE = LAYERS[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_as_on_the_cpu(method: str, dtype: torch.dtype) -> None:
    wrapper = RandomLayer(SHAPE).wrapper(method, num_gpu_experts=1)
    for tokens in (1, 7, 300, 2):
        x, ids, weights = random_batch(SHAPE, tokens, tokens, dtype)
        want = wrapper.forward(x, ids, weights, 0)
        x, ids, weights = (t.cuda() for t in (x, ids, weights))
        stream = torch.cuda.current_stream().cuda_stream
        wrapper.submit_forward(x, ids, weights, stream)
        ids.fill_(-1)  # as SGLang masks ids in place, on the same stream
        found = wrapper.sync_forward(x, stream)
        assert found.is_cuda
        assert torch.equal(found.cpu(), want)


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
@pytest.mark.parametrize("tokens", [1, 6, 64])
def test_graph_replays(
    method: str, tokens: int, flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers in a graph, replayed with inputs that it was not captured with."""
    torch.cuda.init()  # the driver must be loaded
    monkeypatch.setattr(stream_context(), "flags", flags)
    first = RandomLayer(SHAPE).wrapper(method, num_gpu_experts=1)
    second = RandomLayer(SHAPE, seed=2).wrapper(method, layer_idx=1)
    x, ids, weights = (t.cuda() for t in random_batch(SHAPE, tokens))

    def both() -> torch.Tensor:
        y = x
        for wrapper in (first, second):
            chosen = ids.clone()
            wrapper.submit_forward(y, chosen, weights, torch.cuda.current_stream().cuda_stream)
            chosen.fill_(-1)
            y = wrapper.sync_forward(y, torch.cuda.current_stream().cuda_stream)
        return y

    both()  # as SGLang warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for seed in range(5):
        new = random_batch(SHAPE, tokens, seed)
        for tensor, values in zip((x, ids, weights), new, strict=True):
            tensor.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        want = second.forward(first.forward(*new, 0), *new[1:], 0)
        assert torch.equal(found.cpu(), want)


def test_staging_buffers_bring_the_same_bytes() -> None:
    """Out of memory that CUDA knows nothing of, with more pieces than buffers."""
    torch.cuda.init()
    cpus = [cpu.id for cpu in allowed_cpus()]
    staging, stream = _ext.Staging(stream_context(), cpus, 2, 3, 1 << 20), torch.cuda.Stream()
    target = torch.zeros((7 << 20) + 3, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for seed in range(5):
        source = np.random.default_rng(seed).integers(0, 256, len(target), np.uint8)
        staging.copy(source, target.data_ptr(), stream.cuda_stream)
        stream.synchronize()
        assert torch.equal(target.cpu(), torch.from_numpy(source))
