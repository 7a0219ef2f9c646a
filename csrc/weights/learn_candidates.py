"""Learn which tables the packer tries for which blocks.

    python csrc/weights/learn_candidates.py 16 > csrc/weights/int4_candidates_4x16.inc
    python csrc/weights/learn_candidates.py 8 > csrc/weights/int4_candidates_4x8.inc

Blocks fall into classes by their spread and, within a spread, by their crest (largest magnitude
over spread); a class's list holds the tables that together serve its blocks best, found greedily.
To run again whenever learn_tables.py has made other tables. Seeded like it.
"""

import re
import sys
from pathlib import Path

import numpy as np
from learn_tables import BLOCK_ROWS, normalised_blocks, round_fp8, sample_rows

SPREADS, CRESTS, CANDIDATES = 9, 4, 64
BLOCKS_PER_KIND = 60_000
BLOCKS_PER_LIST = 6_000
MEAN_ERROR = 2  # units of a weight's mean error: bytes hold 127 times as much
STEP = 1 / 16  # of the table of errors
CENTRES = np.arange(-127, 127 + STEP / 2, STEP)


def read_tables(block_k: int) -> np.ndarray:
    text = Path(__file__).with_name(f"int4_tables_4x{block_k}.inc").read_text()
    rows = re.findall(r"^\{(.*)\},$", text, re.MULTILINE)
    return np.array([[int(level) for level in row.split(",")] for row in rows])


def sample_blocks(rng: np.random.Generator, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [count, weights] normalised to +-127 and the weight of each one's error.

    The last quarter are of rows that one large weight squeezes together.
    """
    blocks, weights = [], []
    for kind in ("gaussian", "student-t5", "laplace", "outlier"):
        for k in (7168, 2048):
            for fp8 in (False, True):
                rows = BLOCKS_PER_KIND // 4 // (k // block_k) * BLOCK_ROWS + BLOCK_ROWS
                if kind == "outlier":
                    w = sample_rows(rng, "gaussian", k, rows)
                    w[:, 0] = 2 ** rng.uniform(2, 8, rows)
                else:
                    w = sample_rows(rng, kind, k, rows)
                if fp8:
                    w = round_fp8(w)
                block, weight = normalised_blocks(w, block_k)
                blocks.append(block)
                weights.append(weight)
    return np.concatenate(blocks), np.concatenate(weights).astype(np.float32)


def features(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of squares and squared largest magnitude over it, as block_class has them."""
    x = np.rint(blocks * 256).astype(np.int64)
    squares = (x * x >> 16).sum(axis=1)
    top = np.abs(x).max(axis=1) >> 4
    return squares, (top * top / np.maximum(squares, 1)).astype(np.float32)


def errors(blocks: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Squared error of each block under each table [blocks, tables]."""
    distance = np.abs(CENTRES[:, None, None] - tables[None]).min(axis=2).astype(np.float32) ** 2
    bins = np.rint((blocks + 127) / STEP).astype(np.int64)
    return np.stack([distance[row].sum(axis=0) for row in bins])


def choose(cost: np.ndarray) -> list[int]:
    """Greedily, the tables whose best one costs the blocks least: cost [blocks, tables]."""
    best = np.full(len(cost), np.inf, np.float32)
    chosen: list[int] = []
    for _ in range(CANDIDATES):
        totals = np.minimum(cost, best[:, None]).sum(axis=0)
        totals[chosen] = np.inf
        chosen.append(int(totals.argmin()))
        best = np.minimum(best, cost[:, chosen[-1]])
    return sorted(chosen)


def quantile_edges(values: np.ndarray, parts: int) -> np.ndarray:
    return np.quantile(values, np.arange(1, parts) / parts)


def main() -> None:
    rng = np.random.default_rng(2027)
    block_k = int(sys.argv[1])
    tables = read_tables(block_k)
    blocks, weights = sample_blocks(rng, block_k)
    squares, crest = features(blocks)
    # The first spread is for blocks that only a large weight elsewhere in their rows makes small.
    usual = squares[: len(squares) * 3 // 4]
    edges = [np.quantile(usual, 0.002), *quantile_edges(usual, SPREADS - 1)]
    spread_edges = np.ceil(edges).astype(int)
    spread = np.searchsorted(spread_edges, squares, side="right")
    crest_edges, lists, reaches, units = [], [], [], []
    for s in range(SPREADS):
        inside = np.flatnonzero(spread == s)
        edges = np.round(quantile_edges(crest[inside], CRESTS), 4)
        part = np.searchsorted(edges, crest[inside], side="right")
        crest_edges.append(edges)
        for c in range(CRESTS):
            members = rng.permutation(inside[part == c])[:BLOCKS_PER_LIST]
            cost = errors(blocks[members], tables)
            lists.append(choose(cost * weights[members, None]))
            # What the bins cover, and a unit of which the errors are a few.
            reaches.append(np.abs(blocks[members]).max())
            best = cost[:, lists[-1]].min(axis=1).mean() / blocks.shape[1]
            units.append(best / MEAN_ERROR)
    print("// Made by learn_candidates.py: edges of spread and crest, reaches, units, lists.")
    print("{" + ", ".join(str(edge) for edge in spread_edges) + "},")
    print("{" + ",\n ".join("{" + ", ".join(f"{e:.4f}f" for e in row) + "}" for row in crest_edges))
    print("},")
    for values in (reaches, units):
        print("{" + ", ".join(f"{value:.3f}f" for value in values) + "},")
    print("{")
    for row in lists:
        print("{" + ", ".join(str(table) for table in row) + "},")
    print("},")


if __name__ == "__main__":
    main()
