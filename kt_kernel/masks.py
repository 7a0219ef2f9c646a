"""Which experts live on the GPU when the caller chooses by activation frequency."""

from __future__ import annotations

import torch

from kt_kernel.arguments import whole
from kt_kernel.errors import UserError


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Mark the most frequently used experts of all layers together.

    Args:
        activation_freq: ``[num_layers, num_experts]``, any real dtype; larger is more frequent.
        num_gpu_experts: experts to mark over all layers; values outside
            ``[0, num_layers * num_experts]`` are clamped.

    Returns:
        bool ``[num_layers, num_experts]`` on the CPU, true for experts on the GPU. Ties go to the
        lower layer, then the lower expert.

    Raises:
        UserError: ``activation_freq`` is not a matrix, or has a NaN; ``num_gpu_experts`` is no
            integer.
    """
    if activation_freq.dim() != 2:
        raise UserError(
            f"activation_freq has shape {list(activation_freq.shape)}: expected "
            "[num_layers, num_experts]"
        )
    flat = activation_freq.detach().to("cpu").reshape(-1)
    if flat.isnan().any():
        raise UserError("activation_freq has a NaN: expected numbers, larger for more frequent")
    asked = whole("num_gpu_experts", num_gpu_experts)
    count = max(0, min(asked, flat.numel()))
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device="cpu")
    mask[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return mask.reshape(activation_freq.shape)
