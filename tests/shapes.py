"""Shapes that kernels are tested on, in one place."""

from __future__ import annotations

from typing import NamedTuple


class LayerShape(NamedTuple):
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


# Multiples of 64 that are not multiples of 128, H < I and H > I, one expert, all experts; k beyond
# the kernels' KC (512, tiles 1024) by a part of it.
LAYERS = [
    LayerShape(8, 2, 256, 192),
    LayerShape(4, 4, 64, 64),
    LayerShape(1, 1, 192, 448),
    LayerShape(16, 8, 448, 64),
    LayerShape(5, 3, 128, 320),
    LayerShape(2, 1, 1088, 1216),
]

# Every size of a block of tokens that takes its weights directly (4 at most, with AVX-512 8), one
# more, and many.
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64]

# Tokens of one expert: more than take their int4 weights directly (8, AVX-512 64), by every part of
# a block, and than MC share unpacked weights (128, tiles 256).
MANY_TOKENS = [65, 66, 67, 68, 69, 70, 71, 129, 300]
