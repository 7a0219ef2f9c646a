"""Reading ``manifest.json``, which a disk or an editor may have damaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.source.config import LARGEST_SIZE, MOST_EXPERTS, MOST_LAYERS
from convert.source.formats import FORMATS
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import Fields, FileMissing, NotJson, NotObject, read_fields
from kt_kernel.packed import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROJECTIONS,
    PackedLayout,
    layer_file_name,
)

_ERROR_NAME = re.compile(rf"[0-9]{{1,9}}\.({'|'.join(PROJECTIONS)})")
#: Key of the manifest's own SHA-256, over the JSON of all other keys.
DIGEST_KEY = "manifest_sha256"


@dataclass(frozen=True)
class LayerRecord:
    """A finished layer.

    Attributes:
        file: name of its file.
        bytes: size of the file.
        sha256: of the whole file.
        source: shard -> digest of the bytes that the layer was made from.
        errors: ``expert.projection`` -> relative Frobenius error, of the sampled matrices.
    """

    file: str
    bytes: int
    sha256: str
    source: Mapping[str, str]
    errors: Mapping[str, float]


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its digest."""
    rest = {key: value for key, value in manifest.items() if key != DIGEST_KEY}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


class Damaged(UserError):
    """A manifest that is not what this program wrote.

    :attr:`reason` is the message without the advice.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: delete it, finished layers are recognised without it")
        self.reason = reason


class OtherVersion(UserError):
    """A manifest of another version of the format.

    :attr:`reason` is the message without path and advice.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.reason = (
            f"weights in version {version} of the format, this program reads {FORMAT_VERSION}"
        )
        super().__init__(
            f"{path} holds {self.reason}: choose another --output, or delete them and convert again"
        )


def read_manifest(path: Path, check_digest: bool = True) -> Fields:
    """Parse a manifest and check it against its digest.

    Raises:
        FileMissing: there is none.
        Damaged: it is damaged.
        OtherVersion: it is of another version of the format.
        UserError: it is of another program.
    """
    try:
        found = read_fields(path)
        if found.text("format") != FORMAT_NAME:
            raise found.error("format", FORMAT_NAME)
        version = found.integer("format_version")
    except FileMissing:
        raise
    except UserError as error:
        if isinstance(error, NotJson) and not isinstance(error, NotObject):
            raise Damaged(str(error)) from None
        raise UserError(
            f"{error}: it is not a manifest of this program, choose another --output or delete it"
        ) from None
    if version != FORMAT_VERSION:
        raise OtherVersion(path.parent, version)
    digest = found.values.get(DIGEST_KEY, "") if check_digest else ""
    if digest != "" and digest != digest_of(found.values):
        raise Damaged(f"{path} has changed since it was written")
    return found


def are_complete(directory: Path) -> bool:
    """Whether a directory holds all packed weights, as their manifest says."""
    try:
        return read_manifest(directory / MANIFEST_NAME, check_digest=False).flag("complete")
    except UserError:
        return False


def read_layers(found: Fields) -> dict[int, LayerRecord]:
    """The records of a parsed manifest.

    Raises:
        Damaged: a field is not as this program writes it.
    """
    layers: dict[int, LayerRecord] = {}
    with _damage():
        for index, record in found.inner("layers").each():
            layer_idx = int(index) if index.isdecimal() and len(index) < 6 else -1
            errors = record.inner("errors", optional=True)
            if record.text("file") != layer_file_name(layer_idx):
                raise record.error("file", "that layer's")
            if not all(_ERROR_NAME.fullmatch(name) for name in errors.values):
                raise record.error("errors", "an object with names such as 3.gate")
            layers[layer_idx] = LayerRecord(
                file=record.text("file"),
                bytes=record.integer("bytes"),
                sha256=record.text("sha256"),
                source=record.texts("source", {}),
                errors={name: errors.number(name) for name in errors.values},
            )
    return layers


@contextmanager
def _damage() -> Iterator[None]:
    """Say of a field that is not as it was written what it means."""
    try:
        yield
    except UserError as error:
        raise Damaged(str(error)) from None


@dataclass(frozen=True)
class Description:
    """What a manifest says besides its layers.

    Attributes:
        layout: dimensions and method.
        moe_layers: indices of the layers, ascending.
        model_type: of the source's config.
        quantizer: settings of the quantiser.
        input_type: dtype of the source's expert weights.
        fingerprint, files, origin: as in :class:`Identity`.
    """

    layout: PackedLayout
    moe_layers: tuple[int, ...]
    model_type: str
    quantizer: dict[str, str]
    input_type: str
    fingerprint: str
    files: dict[str, str]
    origin: dict[str, str]


def read_description(found: Fields) -> Description:
    """What a parsed manifest says besides its layers.

    Raises:
        Damaged: a field is not as this program writes it.
    """
    with _damage():
        model, source = found.inner("model"), found.inner("source")
        moe_layers = model.integers("moe_layers", MOST_LAYERS)
        if not moe_layers or sorted(set(moe_layers)) != moe_layers:
            raise model.error("moe_layers", "ascending integers")
        if source.text("input_type") not in FORMATS:
            raise source.error("input_type", f"one of {', '.join(FORMATS)}")
        return Description(
            layout=PackedLayout(
                model.integer("num_experts", 1, MOST_EXPERTS),
                model.integer("hidden_size", 1, LARGEST_SIZE),
                model.integer("intermediate_size", 1, LARGEST_SIZE),
                found.text("method"),
            ),
            moe_layers=tuple(moe_layers),
            model_type=model.text("model_type", "unknown"),
            quantizer=found.texts("quantizer"),
            input_type=source.text("input_type"),
            fingerprint=source.text("fingerprint"),
            files=source.texts("files", {}),
            origin={key: source.text(key) for key in ("repo_id", "revision") if source.has(key)},
        )
