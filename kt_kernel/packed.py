"""The packed weight format: names, shapes and headers of its files.

One safetensors file per MoE layer plus ``manifest.json``. Written by ``convert``, read by
:class:`kt_kernel.KTMoEWrapper`, the same on every ISA, thread count and NUMA count.
``docs/weight-format.md`` describes it byte by byte; this module is the only place in Python that
knows the layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import Header, TensorSpec

FORMAT_NAME = "kt-kernel-packed"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Method:
    """A method of quantisation.

    Attributes:
        name: in files and settings.
        bits: of a code.
        block_k: k extent of a table block, 4 rows x so many k that share one table; 0 where the
            codes are the weights.
        kt_method: SGLang's ``--kt-method`` that serves it.
        error_limit: relative Frobenius error of a matrix that cannot be the quantiser's doing.
    """

    name: str
    bits: int
    block_k: int
    kt_method: str
    error_limit: float


#: By name; the first of a ``--kt-method`` is the one that it stands for where no file says which.
#: Errors measured: 0.08 (int4) and 0.007 to 0.009 (int8) on Gaussian weights, 0.09 and 0.011 on
#: Student-t(5); a wrong expert or layout gives 1 and more.
METHODS = {
    method.name: method
    for method in (
        Method("int4", 4, 16, "AMXINT4", 0.3),  # 4.13 bits for each weight
        Method("int4-4x8", 4, 8, "AMXINT4", 0.3),  # 4.25 bits, more accurate
        Method("int8", 8, 0, "AMXINT8", 0.02),
    )
}
#: ``--kt-method`` -> name of the method that it stands for.
KT_METHODS: dict[str, str] = {}
for _method in METHODS.values():
    KT_METHODS.setdefault(_method.kt_method, _method.name)

PROJECTIONS = ("gate", "up", "down")

PANEL_ROWS = 16  # output rows that share one panel: the lanes of a 512-bit int32 accumulator
BLOCK_ROWS = 4  # rows of a table block: a 16-byte lane holds 4 rows x 4 k
MAX_EXPERTS = 65536
MAX_DIM = 131072  # of hidden and intermediate size: sums of int8 products fit int32
DIM_MULTIPLE = 64  # hidden and intermediate size: one AMX tile of k, and whole table blocks
NUM_TABLES = 256
TABLE_LEVELS = 16


_LAYER_FILE = re.compile(r"layer-\d{3,}\.safetensors")


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
        return METHODS[self.method].block_k > 0

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(rows N, columns K) of one expert's ``gate``, ``up`` [I, H] or ``down`` [H, I]."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the file, in file order; the first dimension is the expert."""
        specs: dict[str, TensorSpec] = {}
        e, method = self.num_experts, METHODS[self.method]
        for name in PROJECTIONS:
            n, k = self.projection_shape(name)
            panels = n // PANEL_ROWS
            dtype = "U8" if self.has_tables else "I8"
            specs[f"{name}.codes"] = TensorSpec(dtype, (e, panels, k * method.bits // 32, 64))
            if self.has_tables:
                blocks = k // method.block_k
                specs[f"{name}.table_index"] = TensorSpec("U8", (e, panels, blocks, 4))
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
            meta["block"] = f"{BLOCK_ROWS}x{METHODS[self.method].block_k}"
        return meta


def served_as(method: str) -> str:
    """The ``--kt-method`` of a method; empty if there is no such method."""
    return METHODS[method].kt_method if method in METHODS else ""


def layer_file_name(layer_idx: int) -> str:
    """File name of a layer, ``layer-003.safetensors`` for layer 3."""
    return f"layer-{layer_idx:03d}.safetensors"


def is_last_layer(path: Path) -> bool:
    """Whether a layer's file is that of the last layer in its folder."""
    names = [file.name for file in path.parent.iterdir() if _LAYER_FILE.fullmatch(file.name)]
    return path.name == max(names, key=lambda name: (len(name), name), default=path.name)


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
            other = served_as(str(found))
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
