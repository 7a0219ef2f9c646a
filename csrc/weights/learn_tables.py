"""Learn the 256 tables of 16 int8 levels that INT4 blocks choose from.

    python csrc/weights/learn_tables.py 16 > csrc/weights/int4_tables_4x16.inc
    python csrc/weights/learn_tables.py 8 > csrc/weights/int4_tables_4x8.inc

Lloyd iterations over blocks of 4 rows x 16 or 8 k, drawn from Gaussian, Student-t(5) and Laplace
rows of V3.2's two row lengths, half of them rounded through FP8 e4m3 as the real checkpoint's are.
Rows are normalised by their largest magnitude to +-127. A block is assigned to the table with the
least squared error, then each table's levels move to the centroids of the weights nearest to them.
Errors are weighted by the inverse variance of the row, since what counts is the error relative to
its row.
Seeded: the same output on every run of the same NumPy.
"""

import sys

import numpy as np

TABLES, LEVELS = 256, 16
BLOCK_ROWS = 4
BINS = np.arange(-127, 127.25, 0.25)  # histogram bin centres of a normalised weight
ITERATIONS = 40
BLOCKS_PER_KIND = 24_000


def sample_rows(rng: np.random.Generator, kind: str, k: int, rows: int) -> np.ndarray:
    if kind == "gaussian":
        return rng.standard_normal((rows, k))
    if kind == "student-t5":
        return rng.standard_t(5, (rows, k))
    return rng.laplace(size=(rows, k))


def round_fp8(weights: np.ndarray) -> np.ndarray:
    """Round to e4m3's 3 mantissa bits at the scale of a 128-column block (maximum 448)."""
    rows, k = weights.shape
    blocks = weights.reshape(rows, k // 128, 128)
    scale = np.exp2(np.ceil(np.log2(np.abs(blocks).max(axis=(0, 2), keepdims=True) / 448)))
    x = blocks / scale
    step = np.exp2(np.maximum(np.floor(np.log2(np.abs(x) + 1e-30)), -6) - 3)
    return (np.round(x / step) * step * scale).reshape(rows, k)


def normalised_blocks(rows: np.ndarray, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [count, weights] of rows scaled to +-127, and the weight of each one's error."""
    x = rows * (127 / np.abs(rows).max(axis=1, keepdims=True))
    variance = (x**2).mean(axis=1).reshape(-1, BLOCK_ROWS).mean(axis=1)
    n, k = x.shape
    blocks = x.reshape(n // BLOCK_ROWS, BLOCK_ROWS, k // block_k, block_k)
    weights = np.repeat(1 / variance, k // block_k)
    return blocks.swapaxes(1, 2).reshape(-1, BLOCK_ROWS * block_k), weights


def sample_blocks(rng: np.random.Generator, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Histograms [blocks, bins] of normalised blocks and each block's weight."""
    histograms, weights = [], []
    for kind in ("gaussian", "student-t5", "laplace"):
        for k in (7168, 2048):
            for fp8 in (False, True):
                rows = BLOCKS_PER_KIND // 4 // (k // block_k) * BLOCK_ROWS + BLOCK_ROWS
                w = sample_rows(rng, kind, k, rows)
                if fp8:
                    w = round_fp8(w)
                blocks, weight = normalised_blocks(w, block_k)
                bins = np.rint((blocks + 127) * 4).astype(np.int64)
                flat = (bins + np.arange(len(blocks))[:, None] * len(BINS)).ravel()
                counts = np.bincount(flat, minlength=len(blocks) * len(BINS))
                histograms.append(counts.reshape(len(blocks), len(BINS)).astype(np.float32))
                weights.append(weight)
    return np.concatenate(histograms), np.concatenate(weights).astype(np.float32)


def bin_errors(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared error and nearest level of every bin under every table: [bins, tables]."""
    distance = np.abs(BINS[:, None, None] - tables[None])
    return distance.min(axis=2).astype(np.float32) ** 2, distance.argmin(axis=2)


def quantile_levels(histogram: np.ndarray) -> np.ndarray:
    """Sixteen starting levels: quantiles of the cube-root density, Lloyd-Max's asymptotic one."""
    density = np.cbrt(histogram + 1e-9)
    cumulative = np.cumsum(density) / density.sum()
    return np.interp((np.arange(LEVELS) + 0.5) / LEVELS, cumulative, BINS)


def initial_tables(histograms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blocks ordered by their spread, then by their skew, cut into one group for each table."""
    moments = histograms @ np.stack([BINS, BINS**2], axis=1).astype(np.float32)
    spread = np.log(moments[:, 1] + 1e-6)
    skew = moments[:, 0] / np.sqrt(moments[:, 1] + 1e-6)
    tables = []
    for group in np.array_split(np.argsort(spread), TABLES // 4):
        for part in np.array_split(group[np.argsort(skew[group])], 4):
            tables.append(quantile_levels(histograms[part].sum(axis=0)))
    return np.array(tables) + rng.normal(0, 0.01, (TABLES, LEVELS))


def move_levels(tables: np.ndarray, sums: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Each level to the centroid of its bins; `sums` is the weighted histogram [tables, bins]."""
    moved = tables.copy()
    for t in range(TABLES):
        mass = np.bincount(nearest[:, t], sums[t], LEVELS)
        total = np.bincount(nearest[:, t], sums[t] * BINS, LEVELS)
        moved[t] = np.where(mass > 0, total / np.maximum(mass, 1e-12), tables[t])
    return np.sort(moved, axis=1)


def learn(block_k: int) -> np.ndarray:
    rng = np.random.default_rng(2026)
    histograms, weights = sample_blocks(rng, block_k)
    tables = initial_tables(histograms, rng)
    for iteration in range(ITERATIONS):
        rounded = np.clip(np.rint(tables), -127, 127) if iteration >= ITERATIONS // 2 else tables
        errors, nearest = bin_errors(rounded)
        scores = histograms @ errors
        best = scores.argmin(axis=1)
        chosen = np.zeros((len(best), TABLES), np.float32)
        chosen[np.arange(len(best)), best] = weights
        sums = chosen.T @ histograms
        counts = np.bincount(best, minlength=TABLES)
        tables = move_levels(tables, sums, nearest)
        # A table that nothing chose restarts beside the block that is served worst.
        worst = np.argsort(scores[np.arange(len(best)), best] * weights)[::-1]
        for t, block in zip(np.flatnonzero(counts == 0), worst, strict=False):
            tables[t] = quantile_levels(histograms[block])
    tables = np.clip(np.rint(tables), -127, 127).astype(int)
    return tables[np.lexsort(tables.T[::-1])]


def main() -> None:
    print("// Made by learn_tables.py; 256 tables of 16 ascending levels.")
    for table in learn(int(sys.argv[1])):
        print("{" + ", ".join(f"{level}" for level in table) + "},")


if __name__ == "__main__":
    main()
