"""One projection of one expert: read, dequantise, quantise, write its slice."""

from __future__ import annotations

import hashlib

import numpy as np

from convert.checkpoint import Checkpoint, ExpertProjection
from convert.writer import LayerWriter
from kt_kernel import _ext
from kt_kernel.errors import UserError
from kt_kernel.packed import BLOCK_K

#: --input-type -> the extension's name of the dtype.
EXT_DTYPES = {"fp8": "fp8_e4m3", "bf16": "bf16", "fp16": "fp16"}

#: Raise when the same weights give other bytes than before: it keeps the output of two versions of
#: the quantiser from being mixed in one directory.
QUANTIZER_REVISION = 2


def quantizer_settings(method: str) -> dict[str, str]:
    """What decides the bytes of the output besides the source."""
    settings = {"revision": str(QUANTIZER_REVISION)}
    if method in BLOCK_K:
        settings["tables_sha256"] = hashlib.sha256(_ext.int4_tables(method).tobytes()).hexdigest()
    return settings


def quantize_projection(
    checkpoint: Checkpoint, item: ExpertProjection, input_type: str, method: str
) -> dict[str, np.ndarray]:
    """Quantise one matrix; shapes and dtypes are those of one expert's slice in the layer file.

    Raises:
        UserError: the tensor cannot be read, or holds inf or nan; names file and tensor.
    """
    weight = checkpoint.read(item.weight)
    scale = checkpoint.read(item.scale) if input_type == "fp8" else None
    try:
        return _ext.quantize_projection(weight, EXT_DTYPES[input_type], scale, method)
    except ValueError as error:
        raise UserError(
            f"{checkpoint.shard_of(item.weight)}: {item.weight} cannot be quantised: {error}"
        ) from None


def convert_projection(
    checkpoint: Checkpoint, item: ExpertProjection, input_type: str, method: str, out: LayerWriter
) -> None:
    """Quantise one matrix and write it to its place in the layer file."""
    for part, values in quantize_projection(checkpoint, item, input_type, method).items():
        out.write_expert(f"{item.projection}.{part}", item.expert, values)
