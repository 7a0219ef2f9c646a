"""FP8 e4m3 with one power-of-two float32 scale per 128 x 128 block, as DeepSeek publishes it."""

from __future__ import annotations

import torch

from examples.tiny.config import BLOCK

E4M3_MAX = 448.0


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a float32 [N, K] matrix.

    Returns codes, float8_e4m3fn [N, K], and scales, float32 [ceil(N/128), ceil(K/128)], with
    ``weight ~ codes * scale of its block``. Each scale is the smallest power of two under which
    the block's largest value fits (``scale_fmt: ue8m0``); N and K need not be multiples of 128.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3)).clamp_min(2.0**-100)
    # frexp, not log2: exact at powers of two. x = m * 2**e with m in [0.5, 1).
    mantissa, exponent = torch.frexp(largest / E4M3_MAX)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scales = torch.ldexp(torch.ones_like(largest), exponent)
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view_as(padded)[:rows, :columns].contiguous(), scales


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [N, K] from codes and scales as ``quantize_blocks`` returns them."""
    rows, columns = codes.shape
    spread = scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return codes.to(torch.float32) * spread[:rows, :columns]
