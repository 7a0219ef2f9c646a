"""The number formats of checkpoints, decoded with numpy."""

from __future__ import annotations

import numpy as np


def decode_fp8_e4m3(bits: np.ndarray) -> np.ndarray:
    """uint8 bit patterns of float8 e4m3fn -> float32 (0x7f and 0xff are nan, there is no inf)."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    table = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    decoded: np.ndarray = table[bits]
    return decoded


def decode_float(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of ``BF16``, ``F16`` or ``F32`` -> float32."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits


def decode_int4(packed: np.ndarray, scale: np.ndarray, scale_dtype: str) -> np.ndarray:
    """compressed-tensors' ``pack-quantized`` with symmetric groups -> float32 [N, K].

    Args:
        packed: int32 [N, K/8]; the lowest four bits are the first weight, plus 8.
        scale: raw bits [N, K/group].
        scale_dtype: ``BF16``, ``F16`` or ``F32``.
    """
    pairs = packed.view(np.uint8)
    rows, half = pairs.shape
    groups = scale.shape[1]
    values = np.empty((rows, half, 2), dtype=np.float32)
    values[:, :, 0] = pairs & 15
    values[:, :, 1] = pairs >> 4
    values -= 8
    values = values.reshape(rows, groups, -1)
    values *= decode_float(scale, scale_dtype)[:, :, None]
    return values.reshape(rows, 2 * half)
