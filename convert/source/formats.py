"""The number formats of checkpoints: of each its tensors, what they must be, and what they mean.

The packer decodes fp8, bf16 and fp16 in the extension; :meth:`SourceFormat.decode` does so with
NumPy, for the comparison of what was written with the source.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.source.config import ModelDims
from convert.source.decode import decode_float, decode_fp8_e4m3, decode_int4
from kt_kernel.errors import UserError


class RawTensor(NamedTuple):
    """A tensor as the shard has it: raw bits, and their safetensors dtype."""

    bits: np.ndarray
    dtype: str


class PackerInput(NamedTuple):
    """A matrix as the extension's packer takes it: values or bits, their dtype, block scales."""

    weight: np.ndarray
    dtype: str
    scale: np.ndarray | None = None


class SourceFormat(ABC):
    """How a matrix of an expert is stored.

    Attributes:
        name: as ``--input-type`` and the manifest say.
        dtype: safetensors' name of the weights' dtype.
        suffixes: what the names of its tensors have after the weight's; the weights come first.
    """

    name: str
    dtype: str
    suffixes: tuple[str, ...] = ("",)

    def check_config(self, dims: ModelDims, path: Path) -> None:
        """Check what ``config.json``, at ``path``, says of the format.

        Raises:
            UserError: it is of a kind that is not supported.
        """
        return

    def expected(
        self, shape: tuple[int, int], dims: ModelDims
    ) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Allowed dtypes and the shape of each tensor of a matrix of this shape [N, K]."""
        return [((self.dtype,), shape)]

    @abstractmethod
    def packer_input(self, tensors: Sequence[RawTensor]) -> PackerInput:
        """The matrix for the packer."""

    @abstractmethod
    def decode(self, tensors: Sequence[RawTensor]) -> np.ndarray:
        """The matrix as float32 [N, K]."""


class Float(SourceFormat):
    """bf16 or fp16."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, dtype

    def packer_input(self, tensors: Sequence[RawTensor]) -> PackerInput:
        return PackerInput(tensors[0].bits, self.name)

    def decode(self, tensors: Sequence[RawTensor]) -> np.ndarray:
        return decode_float(*tensors[0])


class Fp8(SourceFormat):
    """DeepSeek V3's: e4m3 with an fp32 scale for each block, the last of which may be partial."""

    name, dtype = "fp8", "F8_E4M3"
    suffixes = ("", "_scale_inv")
    #: Rows and columns of a block: the only ones that the extension takes.
    BLOCK = (128, 128)

    def check_config(self, dims: ModelDims, path: Path) -> None:
        if dims.fp8_block != self.BLOCK:
            found = "missing" if dims.fp8_block is None else list(dims.fp8_block)
            raise UserError(
                f"{path}: quantization_config.weight_block_size is {found}, expected "
                f"{list(self.BLOCK)}: no other FP8 scheme is supported"
            )

    def expected(
        self, shape: tuple[int, int], dims: ModelDims
    ) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        blocks = -(-shape[0] // self.BLOCK[0]), -(-shape[1] // self.BLOCK[1])
        return [((self.dtype,), shape), (("F32",), blocks)]

    def packer_input(self, tensors: Sequence[RawTensor]) -> PackerInput:
        return PackerInput(tensors[0].bits, "fp8_e4m3", tensors[1].bits)

    def decode(self, tensors: Sequence[RawTensor]) -> np.ndarray:
        bits, scale = tensors[0].bits, tensors[1].bits
        rows, columns = bits.shape
        scale = scale.repeat(self.BLOCK[0], axis=0)[:rows]
        weights: np.ndarray = decode_fp8_e4m3(bits) * scale.repeat(self.BLOCK[1], 1)[:, :columns]
        return weights


class CompressedInt4(SourceFormat):
    """compressed-tensors' ``pack-quantized``: symmetric int4 in groups of a row."""

    name, dtype = "int4", "I32"
    suffixes = ("_packed", "_scale", "_shape")
    #: Weights that may share a scale.
    GROUPS = (32, 64, 128)

    def check_config(self, dims: ModelDims, path: Path) -> None:
        found = dims.int4_scheme
        expected = {
            "format": "pack-quantized",
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "actorder": None,
        }
        # What compressed-tensors takes for a field that is absent, when there is a group size.
        absent = {"type": "int", "symmetric": True, "strategy": "group"}
        for key, value in expected.items():
            given = found.get(key)
            # It takes false for no actorder, as for null.
            if (absent.get(key) if given is None else given) not in (value, value or False):
                raise UserError(
                    f"{path}: quantization_config of the experts has {key} {json.dumps(given)}, "
                    f"expected {json.dumps(value)}: no other scheme of compressed-tensors is "
                    f"supported"
                )
        group = found.get("group_size")
        if type(group) is not int or group not in self.GROUPS:
            raise UserError(
                f"{path}: quantization_config has group_size {json.dumps(group)}, expected one of "
                f"{', '.join(map(str, self.GROUPS))}"
            )

    def expected(
        self, shape: tuple[int, int], dims: ModelDims
    ) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        n, k = shape
        return [
            ((self.dtype,), (n, k // 8)),
            (("BF16", "F16", "F32"), (n, k // dims.int4_scheme["group_size"])),
            (("I64", "I32"), (2,)),
        ]

    def packer_input(self, tensors: Sequence[RawTensor]) -> PackerInput:
        return PackerInput(self.decode(tensors), "fp32")

    def decode(self, tensors: Sequence[RawTensor]) -> np.ndarray:
        return decode_int4(tensors[0].bits, *tensors[1])


#: By name. Two that name their weights alike differ in their dtype.
FORMATS: dict[str, SourceFormat] = {
    source_format.name: source_format
    for source_format in (Fp8(), Float("bf16", "BF16"), Float("fp16", "F16"), CompressedInt4())
}
