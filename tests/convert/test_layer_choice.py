"""``--layers``: ranges and parts."""

from __future__ import annotations

import pytest

from convert.layer_choice import parse_layers
from kt_kernel.errors import UserError

MOE_LAYERS = (3, 4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("4-6", (4, 5, 6)), ("0-3", (3,)), ("9", (9,)), ("2/3", (4, 7)), ("8/8", ())],
)
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text).of(MOE_LAYERS) == layers


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_parts_are_the_whole(count: int) -> None:
    parts = [parse_layers(f"{number}/{count}").of(MOE_LAYERS) for number in range(1, count + 1)]
    assert sorted(sum(parts, ())) == list(MOE_LAYERS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "text", ["", "a", "3-", "-3", "6-4", "1/", "0/2", "3/2", "1/0", "1/2/3", "٣"]
)
def test_no_layers(text: str) -> None:
    with pytest.raises(ValueError, match=f"is {text!r}, expected "):
        parse_layers(text)


def test_a_part_that_is_not_there_is_told_those_that_are() -> None:
    """0/0 got "expected a part from 1/0 on"."""
    with pytest.raises(ValueError, match="expected at least one part"):
        parse_layers("0/0")
    with pytest.raises(ValueError, match="expected a part from 1/2 to 2/2"):
        parse_layers("3/2")


def test_a_range_without_experts_is_told() -> None:
    with pytest.raises(UserError, match="--layers 0-2 holds no layer"):
        parse_layers("0-2").of(MOE_LAYERS)
