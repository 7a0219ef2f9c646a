"""One projection of one expert: read, dequantise, quantise, write its slice."""

from __future__ import annotations

import hashlib

import numpy as np

from convert.source.experts import ExpertProjection, ExpertSource
from convert.source_digest import SourceDigest
from convert.writer import LayerWriter
from kt_kernel import _ext
from kt_kernel.errors import UserError
from kt_kernel.packed import METHODS

#: Raise when the same weights give other bytes than before: it keeps the output of two versions of
#: the quantiser from being mixed in one directory.
QUANTIZER_REVISION = 3


def quantizer_settings(method: str) -> dict[str, str]:
    """What decides the bytes of the output besides the source."""
    settings = {"revision": str(QUANTIZER_REVISION)}
    if METHODS[method].block_k:
        settings["tables_sha256"] = hashlib.sha256(_ext.int4_tables(method).tobytes()).hexdigest()
    return settings


def quantize_projection(
    source: ExpertSource,
    item: ExpertProjection,
    method: str,
    digest: SourceDigest | None = None,
) -> dict[str, np.ndarray]:
    """Quantise one matrix; shapes and dtypes are those of one expert's slice in the layer file.

    ``digest`` takes in what was read.

    Raises:
        UserError: the tensor cannot be read, or holds inf or nan; names file and tensor.
    """
    names, tensors = source.tensors(item), source.read(item)
    if digest is not None:
        for name, tensor in zip(names, tensors, strict=True):
            digest.add(name, tensor.bits)
    weight, dtype, scale = source.format.packer_input(tensors)
    try:
        return _ext.quantize_projection(weight, dtype, scale, method)
    except ValueError as error:
        raise UserError(
            f"{source.checkpoint.shard_of(names[0])}: {names[0]} cannot be quantised: {error}"
        ) from None


def convert_projection(
    source: ExpertSource,
    item: ExpertProjection,
    method: str,
    out: LayerWriter,
    digest: SourceDigest,
) -> None:
    """Quantise one matrix and write it to its place in the layer file."""
    parts = quantize_projection(source, item, method, digest)
    for part, values in parts.items():
        out.write_expert(f"{item.projection}.{part}", item.expert, values)
