"""What several test modules need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).parents[2]


def convert_argv(source: Path, output: Path, *more: str) -> list[str]:
    """The command's arguments; ``more`` may repeat a flag, the last one counts."""
    return ["--input-path", str(source), "--output", str(output), "--cpuinfer-threads", "2", *more]


def directory_content(path: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def raw_bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as NumPy sees it; bf16, which NumPy lacks, as uint16 bits."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return np.ascontiguousarray(bits.numpy())
