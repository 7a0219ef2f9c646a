"""What a grammar or a stop pattern does while an answer is made ends one request at most."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_kernel.sglang_plugin.edge import answers


def fill_with(bits: int) -> Any:
    def fill(grammar: Any, mask: torch.Tensor, idx: int) -> None:
        mask[idx].fill_(bits)

    return fill


def accept(grammar: Any, token: int) -> None:
    grammar.accepted = token


def test_a_grammar_without_a_next_token_refuses_the_one_that_is_sampled() -> None:
    """An empty row makes each probability NaN, and the server ends."""
    grammar = SimpleNamespace(matcher=SimpleNamespace(stop_token_ids=[33]))
    mask = torch.zeros(2, 3, dtype=torch.int32)
    answers.open_dead_end(fill_with(0), grammar, mask, 1)
    assert mask.tolist() == [[0, 0, 0], [-1, 0, -1]]  # nor may it end the answer
    with pytest.raises(ValueError, match="allows no further token"):
        answers.accept_or_dead_end(accept, grammar, 5)


def test_a_grammar_with_a_next_token_is_left_alone() -> None:
    grammar, mask = SimpleNamespace(), torch.zeros(1, 3, dtype=torch.int32)
    answers.open_dead_end(fill_with(4), grammar, mask, 0)
    assert mask.tolist() == [[4, 4, 4]]
    answers.accept_or_dead_end(accept, grammar, 5)
    assert grammar.accepted == 5


@pytest.mark.parametrize(
    ("said", "status"), [(f"failed: {answers.DEAD_END}", 400), ("other", 500), (None, 500)]
)
def test_a_dead_end_is_the_clients_error(said: str | None, status: int) -> None:
    def create(abort: Any, message: str | None, status_code: int) -> None:
        abort.message, abort.status_code, abort.err_type = message, status_code, "of SGLang"

    abort = SimpleNamespace()
    answers.blame_client(create, abort, said, status_code=500)
    assert abort.status_code == status


def test_a_stop_pattern_is_searched_for_as_python_does() -> None:
    assert answers.TimedRe.search(r"b+$", "abb").start() == 1
    assert answers.TimedRe.search(r"c", "abb") is None


@pytest.mark.parametrize("pattern", [r"(?:a|b|ab)*\d$", "("])
def test_a_search_without_end_is_an_error_of_the_pattern(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other requests wait for it."""
    monkeypatch.setattr(answers, "SEARCH_SECONDS", 0.02)
    with pytest.raises(re.error):
        answers.TimedRe.search(pattern, "ab" * 200)
