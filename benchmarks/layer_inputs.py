"""The layer's weights and the inputs with a float reference that every engine is checked with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.workers.protocol import (
    HIDDEN,
    INTERMEDIATE,
    PROJECTIONS,
    SOURCES,
    TOP_K,
    Floats,
    choose_experts,
    from_bf16,
    to_bf16,
)

#: What the weights of a source are drawn from; the experts are copies of the sources in turn.
DISTRIBUTIONS = {"gaussian": (0, 1), "t5": (2, 3)}
#: Tokens of a check: few, as in decode, and enough that engines take their path for prefill.
CHECK_TOKENS = (8, 128)


def write_sources(folder: Path) -> None:
    """``gate.npy``, ``up.npy``, ``down.npy``: bf16 bits [SOURCES, N, K]."""
    rng = np.random.default_rng(11)
    for projection in PROJECTIONS:
        n, k = (HIDDEN, INTERMEDIATE) if projection == "down" else (INTERMEDIATE, HIDDEN)
        bits = np.empty((SOURCES, n, k), np.uint16)
        for name, sources in DISTRIBUTIONS.items():
            for source in sources:
                values = rng.standard_normal((n, k), dtype=np.float32)
                if name == "t5":  # a normal over the root of a chi-square mean is Student's t
                    values /= np.sqrt(rng.standard_gamma(2.5, (n, k), dtype=np.float32) / 2.5)
                bits[source] = to_bf16(values / np.sqrt(k, dtype=np.float32))
        np.save(folder / f"{projection}.npy", bits)


def write_checks(folder: Path, experts: int) -> dict[str, list[Path]]:
    """Inputs of both sizes for each distribution, with what a float layer makes of them.

    Returns:
        distribution -> files, one for each of ``CHECK_TOKENS``.
    """
    matrices = {p: np.load(folder / f"{p}.npy", mmap_mode="r") for p in PROJECTIONS}
    rng = np.random.default_rng(12)
    files: dict[str, list[Path]] = {}
    for name, sources in DISTRIBUTIONS.items():
        mine = np.array([e for e in range(experts) if e % SOURCES in sources])
        inputs = []
        for tokens in CHECK_TOKENS:
            x = to_bf16(rng.standard_normal((tokens, HIDDEN), dtype=np.float32))
            weights = rng.random(size=(tokens, TOP_K), dtype=np.float32)
            inputs.append((x, choose_experts(rng, tokens, mine), weights))
        expected = [np.zeros((len(x), HIDDEN), np.float32) for x, _, _ in inputs]
        for source in sources:
            floats = [from_bf16(matrices[p][source]) for p in PROJECTIONS]
            for (x, ids, weights), total in zip(inputs, expected, strict=True):
                share = (weights * (ids % SOURCES == source)).sum(axis=1, keepdims=True)
                total += share * swiglu_expert(from_bf16(x), *floats)
        files[name] = [folder / f"check-{name}-{tokens}.npz" for tokens in CHECK_TOKENS]
        for path, (x, ids, weights), total in zip(files[name], inputs, expected, strict=True):
            np.savez(path, x=x, ids=ids, weights=weights, expected=total)
    return files


def swiglu_expert(x: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    """(silu(x gate^T) * (x up^T)) down^T, in float."""
    a = x @ gate.T
    return (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T
