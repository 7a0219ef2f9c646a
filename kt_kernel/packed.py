"""The packed weight format: names, shapes and headers of its files.

One safetensors file per MoE layer plus ``manifest.json``. Written by ``convert``, read by
:class:`kt_kernel.KTMoEWrapper`, the same on every ISA, thread count and NUMA count.
``docs/weight-format.md`` describes it byte by byte; this module is the only place in Python that
knows the layout.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from kt_kernel.errors import UserError
from kt_kernel.files import LARGEST_INTEGER, open_regular, parse_json, shown

FORMAT_NAME = "kt-kernel-packed"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

#: Quantisation method of the packed files -> ``--kt-method`` of SGLang that serves it. The two int4
#: methods differ in the weights that share a table: 4 rows x 16 k (4.13 bits for each weight) or
#: 4 x 8 (4.25 bits, more accurate).
SERVED_AS = {"int4": "AMXINT4", "int4-4x8": "AMXINT4", "int8": "AMXINT8"}
METHODS = tuple(SERVED_AS)
#: ``--kt-method`` -> the method that it stands for where no file says which.
KT_METHODS = {"AMXINT4": "int4", "AMXINT8": "int8"}
PROJECTIONS = ("gate", "up", "down")

PANEL_ROWS = 16  # output rows that share one panel: the lanes of a 512-bit int32 accumulator
BLOCK_ROWS = 4  # rows of a table block: a 16-byte lane holds 4 rows x 4 k
#: k extent of a table block: 4 rows x this many k share one table.
BLOCK_K = {"int4": 16, "int4-4x8": 8}
MAX_EXPERTS = 65536
MAX_DIM = 131072  # of hidden and intermediate size: sums of int8 products fit int32
DIM_MULTIPLE = 64  # hidden and intermediate size: one AMX tile of k, and whole table blocks
NUM_TABLES = 256
TABLE_LEVELS = 16
DATA_ALIGNMENT = 64  # bytes; a cache line, so that panels never straddle one

#: Bytes of a safetensors header at most, by the format's own limit.
LARGEST_HEADER = 100_000_000
#: Bits of an element by safetensors' dtype; a file's tensors of other types are not looked into.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}


_LAYER_FILE = re.compile(r"layer-\d{3,}\.safetensors")


@dataclass(frozen=True)
class TensorSpec:
    """Safetensors dtype name and shape of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = _DTYPE_BITS[self.dtype] // 8
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class PackedLayout:
    """What the layer file of one MoE layer holds.

    Args:
        num_experts: routed experts of the layer, all of them are stored.
        hidden_size: model width H; multiple of 64.
        intermediate_size: width I of one expert; multiple of 64.
        method: one of ``METHODS``.

    Raises:
        UserError: an unknown method or a dimension that the format cannot hold.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    method: str

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(
                f"unknown quantisation method {self.method!r}: expected one of {', '.join(METHODS)}"
            )
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise UserError(
                f"number of experts is {self.num_experts}: expected at least 1 and at most "
                f"{MAX_EXPERTS}"
            )
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value < DIM_MULTIPLE or value > MAX_DIM or value % DIM_MULTIPLE:
                raise UserError(
                    f"{name} is {value}: expected a positive multiple of {DIM_MULTIPLE}, the "
                    f"block size of the packed format, up to {MAX_DIM}; this model cannot be packed"
                )

    @property
    def has_tables(self) -> bool:
        """Whether the weights are indices into tables: int4."""
        return self.method in BLOCK_K

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(rows N, columns K) of one expert's ``gate``, ``up`` [I, H] or ``down`` [H, I]."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the file, in file order; the first dimension is the expert."""
        specs: dict[str, TensorSpec] = {}
        e = self.num_experts
        for name in PROJECTIONS:
            n, k = self.projection_shape(name)
            panels = n // PANEL_ROWS
            if self.has_tables:
                blocks = k // BLOCK_K[self.method]
                specs[f"{name}.codes"] = TensorSpec("U8", (e, panels, k // 8, 64))
                specs[f"{name}.table_index"] = TensorSpec("U8", (e, panels, blocks, 4))
            else:
                specs[f"{name}.codes"] = TensorSpec("I8", (e, panels, k // 4, 64))
            specs[f"{name}.scales"] = TensorSpec("BF16", (e, n))
        if self.has_tables:
            specs["tables"] = TensorSpec("I8", (NUM_TABLES, TABLE_LEVELS))
        return specs

    @property
    def num_weights(self) -> int:
        """Weights that the file stands for: 3 projections of every expert."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size

    def bits_per_weight(self) -> float:
        """Bits stored per weight, scales and table indices included."""
        return 8 * sum(spec.nbytes for spec in self.tensors().values()) / self.num_weights

    def metadata(self, layer_idx: int) -> dict[str, str]:
        """The metadata that identifies a layer file; a writer may add keys of its own."""
        meta = {
            "format": FORMAT_NAME,
            "format_version": str(FORMAT_VERSION),
            "method": self.method,
            "layer_idx": str(layer_idx),
            "num_experts": str(self.num_experts),
            "hidden_size": str(self.hidden_size),
            "intermediate_size": str(self.intermediate_size),
        }
        if self.has_tables:
            meta["block"] = f"{BLOCK_ROWS}x{BLOCK_K[self.method]}"
        return meta


def layer_file_name(layer_idx: int) -> str:
    """File name of a layer, ``layer-003.safetensors`` for layer 3."""
    return f"layer-{layer_idx:03d}.safetensors"


def is_last_layer(path: Path) -> bool:
    """Whether a layer's file is that of the last layer in its folder."""
    names = [file.name for file in path.parent.iterdir() if _LAYER_FILE.fullmatch(file.name)]
    return path.name == max(names, key=lambda name: (len(name), name), default=path.name)


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
    bits = _DTYPE_BITS.get(dtype)
    if bits is not None:
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


def check_layer_header(header: Header, layout: PackedLayout, layer_idx: int) -> None:
    """Check that a layer file is the one that ``layout`` and ``layer_idx`` describe.

    Raises:
        UserError: names the file, the value found and the value expected.
    """
    found_format = header.metadata.get("format")
    if found_format != FORMAT_NAME:
        raise UserError(
            f"{header.path} is not a packed expert file (format {found_format!r}, expected "
            f"{FORMAT_NAME!r}): make it with python -m convert"
        )
    for key, expected in layout.metadata(layer_idx).items():
        found = header.metadata.get(key)
        if found == expected:
            continue
        if key == "method":
            other = SERVED_AS.get(str(found))
            hint = (f"set --kt-method to {other} or " if other else "") + "convert with that method"
        elif key == "format_version":
            hint = "convert again with this version"
        else:
            hint = "these are weights of another model; convert this one"
        raise UserError(f"{header.path} has {key} {found}, expected {expected}: {hint}")
    for name, spec in layout.tensors().items():
        entry = header.tensors.get(name)
        if entry is None:
            raise UserError(f"{header.path} has no tensor {name}: convert this layer again")
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise UserError(
                f"{header.path}: tensor {name} is {entry.dtype} {list(entry.shape)}, expected "
                f"{spec.dtype} {list(spec.shape)}: convert this layer again"
            )
        if entry.end - entry.begin != spec.nbytes:
            raise UserError(
                f"{header.path}: tensor {name} spans {entry.end - entry.begin} bytes, expected "
                f"{spec.nbytes}: convert this layer again"
            )
