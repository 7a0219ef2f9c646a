"""Headers of safetensors files: where their tensors lie."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from kt_kernel.errors import UserError
from kt_kernel.files.foreign import LARGEST_INTEGER, open_regular, parse_json, shown

#: Bytes of a safetensors header at most, by the format's own limit.
LARGEST_HEADER = 100_000_000
#: Safetensors' dtype -> NumPy's code of its raw bits, which ends in the bytes of an element (NumPy
#: has neither FP8 nor bf16); a file's tensors of other types are not looked into.
_RAW_TYPES = {
    **dict.fromkeys(("BOOL", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), "u1"),
    **dict.fromkeys(("U16", "F16", "BF16"), "u2"),
    **{f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "UI" for size in (4, 8)},
    **{"I8": "i1", "I16": "i2", "F32": "f4", "F64": "f8"},
}


def raw_type(dtype: str) -> str:
    """NumPy's code of the raw bits of a tensor of this safetensors dtype."""
    return _RAW_TYPES[dtype]


#: Bytes of whose multiple the data begins where we write a file: a cache line.
DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """Safetensors dtype name and shape of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = int(_RAW_TYPES[self.dtype][1])
        for extent in self.shape:
            size *= extent
        return size


def header_bytes(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's bytes before the data of these tensors, which follow in their order.

    Size prefix and JSON, padded with spaces, which the format allows, so that the data starts at a
    multiple of ``DATA_ALIGNMENT`` bytes.
    """
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in tensors.items():
        described[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a file: ``begin``/``end`` are absolute byte offsets."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    data_start: int
    file_size: int

    @property
    def data_end(self) -> int:
        """Where the last tensor ends: the file's size, if nothing is behind it."""
        return max((entry.end for entry in self.tensors.values()), default=self.data_start)


def read_header(path: str | Path) -> Header:
    """Parse and check a safetensors header without reading tensor data.

    The format: 8 bytes little-endian header size, that many bytes of JSON, then the data. Each
    tensor spans what its shape needs, and one follows the other without a gap.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    path = Path(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            content = file.read(length) if length <= min(file_size, LARGEST_HEADER) else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(prefix) < 8:
        raise UserError(f"{path} is truncated: {file_size} bytes hold no safetensors header")
    if length > file_size - 8:
        raise UserError(
            f"{path} is truncated or not a safetensors file: its header claims {length} "
            f"bytes, the file has {file_size}"
        )
    try:
        if len(content) != length:
            raise ValueError(f"it has {length} bytes, expected at most {LARGEST_HEADER}")
        metadata, tensors = _parse_header(content, 8 + length)
    except ValueError as error:
        raise UserError(
            f"{path} is not a safetensors file: its header is not valid: {error}"
        ) from None
    header = Header(path, metadata, tensors, 8 + length, file_size)
    if file_size < header.data_end:
        raise UserError(
            f"{path} is truncated: expected {header.data_end} bytes, found {file_size}; make the "
            f"file again"
        )
    return header


def _parse_header(content: bytes, start: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and tensors of a header's JSON; the data starts at byte ``start`` of the file.

    Raises:
        ValueError: says what is wrong.
    """
    raw = parse_json(content)
    if not isinstance(raw, dict):
        raise ValueError("it is not an object")
    metadata = raw.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is what some writers put for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    tensors = {name: _parse_entry(name, entry, start) for name, entry in raw.items()}
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(
                f"tensor {name} begins at byte {entry.begin - start}, not {end - start}"
            )
        end = entry.end
    return metadata, tensors


def _parse_entry(name: str, entry: Any, start: int) -> TensorEntry:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)):
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets of {name} are {shown(offsets)}, expected begin and end")
    if dtype in _RAW_TYPES:
        bits = 8 * int(_RAW_TYPES[dtype][1])
        for extent in shape:
            bits *= extent
            if bits > LARGEST_INTEGER:
                raise ValueError(f"the shape of {name} is too large")
        if bits != 8 * (offsets[1] - offsets[0]):
            raise ValueError(
                f"{name} spans {offsets[1] - offsets[0]} bytes, expected {bits / 8:.0f} for its "
                f"shape"
            )
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= LARGEST_INTEGER for value in values
    )
