"""Which layers of a model a process converts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kt_kernel.errors import UserError
from kt_kernel.files.units import ranges


@dataclass(frozen=True)
class LayerRange:
    """The layers ``first`` to ``last``, both included."""

    first: int
    last: int

    def of(self, moe_layers: Sequence[int]) -> tuple[int, ...]:
        """Those of them that have experts.

        Raises:
            UserError: none has.
        """
        chosen = tuple(idx for idx in moe_layers if self.first <= idx <= self.last)
        if not chosen:
            raise UserError(
                f"--layers {self.first}-{self.last} holds no layer with experts: this model has "
                f"them in layers {shown_layers(moe_layers)}"
            )
        return chosen


@dataclass(frozen=True)
class LayerPart:
    """Every ``count``-th layer with experts, beginning with the ``number``-th, from 1."""

    number: int
    count: int

    def of(self, moe_layers: Sequence[int]) -> tuple[int, ...]:
        """The layers; none where there are more parts than layers."""
        return tuple(moe_layers[self.number - 1 :: self.count])


LayerChoice = LayerRange | LayerPart


def parse_layers(text: str) -> LayerChoice:
    """``A-B``, ``A`` or ``I/N``.

    Raises:
        ValueError: something else, or no such range or part.
    """
    first, mark, second = text.partition("/" if "/" in text else "-")
    if not _is_number(first) or (mark and not _is_number(second)):
        raise ValueError(f"is {text!r}, expected A-B or A, as in 3-20, or a part, as in 2/8")
    if mark == "/":
        part = LayerPart(int(first), int(second))
        if part.count == 0:
            raise ValueError(f"is {text!r}, expected at least one part, as in 2/8")
        if not 1 <= part.number <= part.count:
            raise ValueError(
                f"is {text!r}, expected a part from 1/{part.count} to {part.count}/{part.count}"
            )
        return part
    bounds = LayerRange(int(first), int(second or first))
    if bounds.first > bounds.last:
        raise ValueError(f"is {text!r}, expected the smaller number first")
    return bounds


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


def shown_layers(layers: Collection[int]) -> str:
    """Layers as people write them: ``3-20, 22``."""
    return ranges(layers, ", ")
