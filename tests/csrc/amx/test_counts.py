"""How many tile instructions a layer call takes, against the closed form of its blocking."""

from __future__ import annotations

import pytest

from tests.csrc.amx import closed_form, tile_unit

pytestmark = pytest.mark.skipif(
    not tile_unit.COUNTS, reason=tile_unit.ABSENT or "the CPU's own tile unit counts nothing"
)

#: One block of tokens, two, part of a third; sizes within KC and beyond one and two of it.
CASES = [
    *((tokens, 256, 192) for tokens in (9, 16, 17, 32, 33, 100)),
    (33, 1024, 64),
    (33, 1088, 64),
    (17, 64, 2112),
    (300, 64, 1088),
]


@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), CASES)
def test_as_many_as_the_closed_form(
    monkeypatch: pytest.MonkeyPatch, method: str, tokens: int, hidden: int, intermediate: int
) -> None:
    monkeypatch.setenv("KT_TARGET", "amx")
    found = closed_form.counted(tokens, hidden, intermediate, method)
    assert found == closed_form.layer(tokens, hidden, intermediate, method)


def test_few_tokens_take_the_vector_kernels(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("KT_TARGET", "amx")
    assert closed_form.counted(closed_form.MIN_TOKENS - 1, 256, 192, method) == {}
