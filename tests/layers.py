"""Layers with random weights, and what their experts are after packing."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch

from kt_kernel import KTMoEWrapper, _ext, packed
from tests import reference
from tests.reference import Expert
from tests.shapes import LayerShape

THREADS = len(os.sched_getaffinity(0))


class RandomLayer:
    """bf16 weights of one layer, Gaussian or Student-t(5), seeded."""

    def __init__(self, shape: LayerShape, seed: int = 0, student_t: bool = False) -> None:
        self.shape = shape
        self._packed: dict[str, dict[int, Expert]] = {}
        rng = np.random.default_rng(seed)
        e, _, h, i = shape

        def draw(n: int, k: int) -> torch.Tensor:
            w = rng.standard_t(5, (e, n, k)) if student_t else rng.standard_normal((e, n, k))
            return torch.from_numpy(w / np.sqrt(k)).to(torch.bfloat16)

        self.gate, self.up, self.down = draw(i, h), draw(i, h), draw(h, i)

    def wrapper(self, method: str, threads: int = THREADS, **kwargs: Any) -> KTMoEWrapper:
        """A loaded wrapper on the target that KT_TARGET names; ``method`` is of packed.METHODS."""
        e, k, h, i = self.shape
        wrapper = KTMoEWrapper(
            layer_idx=kwargs.pop("layer_idx", 0),
            num_experts=e,
            num_experts_per_tok=k,
            hidden_size=h,
            moe_intermediate_size=i,
            cpuinfer_threads=threads,
            threadpool_count=kwargs.pop("threadpool_count", 1),
            method=packed.METHODS[method].kt_method,
            **kwargs,
        )
        wrapper.load_weights_from_tensors(self.gate, self.up, self.down, torch.arange(e), method)
        return wrapper

    def original(self) -> dict[int, Expert]:
        gate, up, down = (w.double().numpy() for w in (self.gate, self.up, self.down))
        return {e: (gate[e], up[e], down[e]) for e in range(self.shape.num_experts)}

    def packed(self, method: str) -> dict[int, Expert]:
        """The experts that the packed weights stand for, packed once for each method."""
        if method not in self._packed:
            self._packed[method] = self._pack(method)
        return self._packed[method]

    def _pack(self, how: str) -> dict[int, Expert]:
        def through(w: torch.Tensor) -> np.ndarray:
            n, k = w.shape
            bits = w.contiguous().view(torch.uint16).numpy()
            return reference.dequantize(
                _ext.quantize_projection(bits, "bf16", None, how), n, k, how
            )

        return {
            e: (through(self.gate[e]), through(self.up[e]), through(self.down[e]))
            for e in range(self.shape.num_experts)
        }


@functools.cache
def shared_layer(shape: LayerShape, student_t: bool = False) -> RandomLayer:
    """The layer of seed 0, drawn and packed once for all targets."""
    return RandomLayer(shape, student_t=student_t)


def random_batch(
    shape: LayerShape, tokens: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], distinct ids int32 [T, k] and weights fp32 [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).to(dtype)
    scores = torch.rand(tokens, shape.num_experts, generator=generator)
    ids = scores.topk(shape.top_k).indices.int()
    return x, ids, torch.rand(tokens, shape.top_k, generator=generator)
