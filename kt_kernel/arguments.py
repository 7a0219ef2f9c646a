"""What callers pass, checked before any of it is narrowed to what the extension takes."""

from __future__ import annotations

import operator
from typing import Any

import torch

from kt_kernel.errors import UserError


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int, which it is or stands for exactly (NumPy's integers, say).

    Raises:
        UserError: it is no integer, or outside [least, most]; names ``name``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}: expected an integer") from None
    if (least is not None and number < least) or (most is not None and number > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{name} is {number}: expected {expected}")
    return number


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[Any, ...]
) -> None:
    """Raise :class:`UserError` unless ``tensor`` has this shape and one of these dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{name} is {type(tensor).__name__}: expected a tensor {list(shape)}")
    if tensor.layout != torch.strided:
        raise UserError(f"{name} is {tensor.layout}: expected a dense tensor {list(shape)}")
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise UserError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}: expected "
            f"{' or '.join(str(d) for d in dtypes)} {list(shape)}"
        )
