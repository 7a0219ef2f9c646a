"""How many tile instructions a layer call takes: what its blocking implies.

For M tokens of an expert times N rows of weights with K columns:

* products: ceil(M/16) x N/16 x K/64, the fewest that tiles of 16 x 64 allow
* zeros: ceil(M/16) x N/16, one for each tile of sums
* stores: as many for each KC. Int4 is unpacked by KC = 1024 k, S = ceil(K/1024) times; int8 weights
  are tiles as they stand, so S = 1
* loads: 4 for the 4 products of 64 k by 2 panels by 32 tokens; 3 for the 2 products of the last
  16 tokens where ceil(M/16) is odd; and every tile of sums again for each KC but the first
* loadconfigs, releases: one for each run of panels that a worker takes
  (csrc/threads/guided_counter.h)

A layer call is one such product for gate and up, N twice the intermediate size, and one for down.
"""

from __future__ import annotations

from kt_kernel.packed import METHODS
from tests.csrc.amx import tile_unit
from tests.layers import THREADS, RandomLayer, random_batch
from tests.shapes import LayerShape

#: Fewer tokens of an expert take the vector kernels.
MIN_TOKENS = 9
KC = 1024


def runs(items: int, workers: int) -> int:
    """How many runs ``workers`` of one group take ``items`` in: each half of a share."""
    count = 0
    while items > 0:
        items -= max(1, items // (2 * workers))
        count += 1
    return count


def product(tokens: int, n: int, k: int, method: str) -> dict[str, int]:
    """Instructions of an [n, k] matrix times ``tokens``, without loadconfig and release."""
    row_blocks = -(-tokens // 16)
    sums = row_blocks * n // 16
    unpackings = -(-k // KC) if METHODS[method].block_k else 1
    steps = n // 32 * k // 64
    return {
        "product": sums * k // 64,
        "load": steps * (4 * (row_blocks // 2) + 3 * (row_blocks % 2)) + sums * (unpackings - 1),
        "store": sums * unpackings,
        "zero": sums,
    }


def layer(tokens: int, hidden: int, intermediate: int, method: str) -> dict[str, int]:
    """Instructions of a call of a layer whose only expert gets ``tokens`` >= MIN_TOKENS."""
    gate_up = product(tokens, 2 * intermediate, hidden, method)
    down = product(tokens, hidden, intermediate, method)
    configurations = runs(intermediate // 16, THREADS) + runs(hidden // 32, THREADS)
    return {
        **{kind: gate_up[kind] + down[kind] for kind in gate_up},
        "loadconfig": configurations,
        "release": configurations,
    }


def counted(tokens: int, hidden: int, intermediate: int, method: str) -> dict[str, int]:
    """The same as counted in a call. KT_TARGET must be amx, and tile_unit installed."""
    shape = LayerShape(1, 1, hidden, intermediate)
    wrapper = RandomLayer(shape).wrapper(method)
    before = tile_unit.counts()
    wrapper.forward(*random_batch(shape, tokens), 0)
    used = {kind: after - before[kind] for kind, after in tile_unit.counts().items()}
    return {kind: count for kind, count in used.items() if count}
