"""The layer's weights and the inputs with a float reference that every engine is checked with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.workers.protocol import (
    HIDDEN,
    INTERMEDIATE,
    PROJECTIONS,
    TOP_K,
    Floats,
    choose_experts,
    from_bf16,
    to_bf16,
)

#: What weights are drawn from: the first half of the sources from one, the others from the other.
DISTRIBUTIONS = ("gaussian", "t5")
#: Tokens of a check: few, as in decode, and enough that engines take their path for prefill.
CHECK_TOKENS = (8, 64)


def write_sources(folder: Path, each: int) -> None:
    """``gate.npy``, ``up.npy``, ``down.npy``: bf16 bits [S, N, K], ``each`` of a distribution."""
    rng = np.random.default_rng(11)
    for projection in PROJECTIONS:
        n, k = (HIDDEN, INTERMEDIATE) if projection == "down" else (INTERMEDIATE, HIDDEN)
        bits = np.empty((each * len(DISTRIBUTIONS), n, k), np.uint16)
        for source, target in enumerate(bits):
            values = rng.standard_normal((n, k), dtype=np.float32)
            if DISTRIBUTIONS[source // each] == "t5":  # a normal over the root of a chi-square mean
                values /= np.sqrt(rng.standard_gamma(2.5, (n, k), dtype=np.float32) / 2.5)
            target[:] = to_bf16(values / np.sqrt(k, dtype=np.float32))
        np.save(folder / f"{projection}.npy", bits)


def write_checks(
    folder: Path, experts: int, sizes: tuple[int, ...] = CHECK_TOKENS
) -> dict[str, list[Path]]:
    """Inputs of these numbers of tokens for each distribution, with what a float layer gives.

    Returns:
        distribution -> files, one for each size.
    """
    matrices = {p: np.load(folder / f"{p}.npy", mmap_mode="r") for p in PROJECTIONS}
    rng = np.random.default_rng(12)
    files: dict[str, list[Path]] = {}
    total_sources = len(matrices["gate"])
    each = total_sources // len(DISTRIBUTIONS)
    for number, name in enumerate(DISTRIBUTIONS):
        sources = range(number * each, (number + 1) * each)
        mine = np.array([e for e in range(experts) if e % total_sources in sources])
        inputs = []
        for tokens in sizes:
            x = to_bf16(rng.standard_normal((tokens, HIDDEN), dtype=np.float32))
            weights = rng.random(size=(tokens, TOP_K), dtype=np.float32)
            inputs.append((x, choose_experts(rng, tokens, mine), weights))
        expected = [np.zeros((len(x), HIDDEN), np.float32) for x, _, _ in inputs]
        for source in sources:
            floats = [from_bf16(matrices[p][source]) for p in PROJECTIONS]
            for (x, ids, weights), total in zip(inputs, expected, strict=True):
                share = (weights * (ids % total_sources == source)).sum(axis=1, keepdims=True)
                total += share * swiglu_expert(from_bf16(x), *floats)
        files[name] = [folder / f"check-{name}-{tokens}.npz" for tokens in sizes]
        for path, (x, ids, weights), total in zip(files[name], inputs, expected, strict=True):
            np.savez(path, x=x, ids=ids, weights=weights, expected=total)
    return files


def swiglu_expert(x: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    """(silu(x gate^T) * (x up^T)) down^T, in float."""
    a = x @ gate.T
    silu = a * (0.5 + 0.5 * np.tanh(0.5 * a))  # does not overflow, as a / (1 + exp(-a)) would
    output: Floats = (silu * (x @ up.T)) @ down.T
    return output
