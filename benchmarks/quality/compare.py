"""Two servers' results of the same prompts side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.markdown import table
from benchmarks.quality.answers import Result


def divergence(original: dict[str, float], other: dict[str, float]) -> float:
    """KL(original || other) in nats of one position.

    Tokens that are not in both lists are one event, so that the value is a lower bound, and exact
    where the lists hold nearly all of the probability.
    """
    shared = original.keys() & other.keys()
    total = sum(math.exp(original[t]) * (original[t] - other[t]) for t in shared)
    rest = [max(1 - sum(math.exp(d[t]) for t in shared), 1e-9) for d in (original, other)]
    return max(total + rest[0] * math.log(rest[0] / rest[1]), 0.0)


def summary(original: Sequence[Result], other: Sequence[Result]) -> dict[str, Any]:
    """Accuracy of each task, perplexity and divergence of ``other`` against ``original``.

    Raises:
        BenchmarkError: they are not of the same prompts, or the tokenizers differ.
    """
    by_id = {result.prompt.id: result for result in original}
    if by_id.keys() != {r.prompt.id for r in other} or any(
        by_id[r.prompt.id].tokens != r.tokens for r in other
    ):
        raise BenchmarkError("the two files are not of the same prompts and tokens")
    tasks: dict[str, list[bool]] = {}
    for result in other:
        tasks.setdefault(result.prompt.task, []).append(result.right)
    kl = [
        divergence(a, b)
        for result in other
        for a, b in zip(by_id[result.prompt.id].top, result.top, strict=True)
    ]
    log_probability = [value for result in other for value in result.log_probability]
    same = [by_id[r.prompt.id].text == r.text for r in other]
    return {
        "accuracy": sum(map(sum, tasks.values())) / len(other),
        "tasks": {task: sum(right) / len(right) for task, right in tasks.items()},
        "same answers": sum(same) / len(same),
        "perplexity": math.exp(-sum(log_probability) / len(log_probability)),
        "KL": sum(kl) / len(kl),
        "KL median": sorted(kl)[len(kl) // 2],
        "positions": len(kl),
        "questions": len(other),
    }


def comparison(rows: dict[str, dict[str, Any]]) -> str:
    """Summaries by name, as a Markdown table."""
    tasks = list(next(iter(rows.values()))["tasks"])
    head = ["", *tasks, "all", "same answer", "perplexity", "KL, nats"]
    body = []
    for name, row in rows.items():
        shares = [*(row["tasks"][task] for task in tasks), row["accuracy"], row["same answers"]]
        numbers = [f"{row['perplexity']:.4f}", f"{row['KL']:.2e}"]
        body.append([name, *(f"{share:.1%}" for share in shares), *numbers])
    return "\n".join(table(head, body))
