"""What a load tells: growth, waiting, and a sentence that hides neither."""

from __future__ import annotations

import pytest

from benchmarks.rehearsal import soak


def test_growth_is_that_after_the_pools_have_filled() -> None:
    samples = [
        {"second": float(i), "memory": 100.0 + (50 if i else 0) + i, "threads": 7.0}
        for i in range(20)
    ]
    # Medians of samples 4 to 7 and 16 to 19; the jump after the first does not count.
    assert soak.growth(samples) == {"memory": 12.0, "threads": 0.0}
    with pytest.raises(ValueError, match="no samples"):
        soak.growth([])


def test_quantiles() -> None:
    found = soak.quantiles([float(n) for n in range(200, 0, -1)])
    assert found == {"p50": 100.0, "p99": 198.0, "most": 200.0, "count": 200}
    assert soak.quantiles([]) == {"count": 0}


def test_changed_answers_and_errors_are_told() -> None:
    found = {
        "minutes": 20.0,
        "streams": 16,
        "first_token": {"p50": 0.7, "p99": 6.9, "most": 9.2, "count": 3},
        "between_tokens": {"count": 0},
        "finished": 1114,
        "aborted": 557,
        "errors": 2,
        "answers_unchanged": False,
        "growth": {"memory": 5e6, "card": 0.0, "threads": 1.0, "files": -2.0},
    }
    text = "\n".join(soak.sentences(found))
    assert "1114 answers and 557 broken off, 2 errors" in text
    assert "memory +5 MB, GPU memory +0 MB, threads +1, open files -2" in text
    assert "NOT the same as before" in text
