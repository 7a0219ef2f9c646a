"""Shapes that kernels are tested on, in one place."""

from __future__ import annotations

from typing import NamedTuple


class LayerShape(NamedTuple):
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


# Multiples of 64 that are not multiples of 128, H < I and H > I, one expert, all experts; k beyond
# the kernels' slabs (512, tiles 1024) by a part of one.
LAYERS = [
    LayerShape(8, 2, 256, 192),
    LayerShape(4, 4, 64, 64),
    LayerShape(1, 1, 192, 448),
    LayerShape(16, 8, 448, 64),
    LayerShape(5, 3, 128, 320),
    LayerShape(2, 1, 1088, 1216),
]

# Around every target's block of tokens (4, 2, 8), one token, and many.
TOKENS = [1, 2, 3, 7, 8, 9, 17, 64]

# Tokens of one expert: more than take their weights directly (AVX-512: 16, int4 64), and than share
# an unpacked slab (128, tiles 256), by part of a block.
MANY_TOKENS = [65, 129, 300]
