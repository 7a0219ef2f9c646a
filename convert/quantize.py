"""One projection of one expert: read, dequantise, quantise, write its slice."""

from __future__ import annotations

import hashlib

import numpy as np

from convert.checkpoint import Checkpoint, ExpertProjection
from convert.decode import decode_int4
from convert.source_digest import SourceDigest
from convert.writer import LayerWriter
from kt_kernel import _ext
from kt_kernel.errors import UserError
from kt_kernel.packed import BLOCK_K

#: --input-type -> the extension's name of the dtype.
EXT_DTYPES = {"fp8": "fp8_e4m3", "bf16": "bf16", "fp16": "fp16", "int4": "fp32"}

#: Raise when the same weights give other bytes than before: it keeps the output of two versions of
#: the quantiser from being mixed in one directory.
QUANTIZER_REVISION = 3


def quantizer_settings(method: str) -> dict[str, str]:
    """What decides the bytes of the output besides the source."""
    settings = {"revision": str(QUANTIZER_REVISION)}
    if method in BLOCK_K:
        settings["tables_sha256"] = hashlib.sha256(_ext.int4_tables(method).tobytes()).hexdigest()
    return settings


def quantize_projection(
    checkpoint: Checkpoint,
    item: ExpertProjection,
    input_type: str,
    method: str,
    digest: SourceDigest | None = None,
) -> dict[str, np.ndarray]:
    """Quantise one matrix; shapes and dtypes are those of one expert's slice in the layer file.

    ``digest`` takes in what was read.

    Raises:
        UserError: the tensor cannot be read, or holds inf or nan; names file and tensor.
    """
    names = item.tensors(input_type)
    bits = [checkpoint.read(name) for name in names]
    if digest is not None:
        for name, values in zip(names, bits, strict=True):
            digest.add(name, values)
    weight, scale = bits[0], bits[1] if input_type == "fp8" else None
    if input_type == "int4":
        weight = decode_int4(weight, bits[1], checkpoint.entry(names[1]).dtype)
    try:
        return _ext.quantize_projection(weight, EXT_DTYPES[input_type], scale, method)
    except ValueError as error:
        raise UserError(
            f"{checkpoint.shard_of(names[0])}: {names[0]} cannot be quantised: {error}"
        ) from None


def convert_projection(
    checkpoint: Checkpoint,
    item: ExpertProjection,
    input_type: str,
    method: str,
    out: LayerWriter,
    digest: SourceDigest,
) -> None:
    """Quantise one matrix and write it to its place in the layer file."""
    parts = quantize_projection(checkpoint, item, input_type, method, digest)
    for part, values in parts.items():
        out.write_expert(f"{item.projection}.{part}", item.expert, values)
