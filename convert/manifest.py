"""``manifest.json``: what an output directory holds and how far the conversion got.

Nothing in it depends on time, host or path, so two conversions of the same checkpoint have the same
manifest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.durable import replace_file
from convert.model_config import read_json
from kt_kernel.errors import UserError
from kt_kernel.packed import FORMAT_NAME, FORMAT_VERSION, MANIFEST_NAME, PackedLayout


@dataclass(frozen=True)
class Identity:
    """What makes two conversions the same; layers of different identity never share a directory.

    Attributes:
        fingerprint: of the source, :meth:`convert.checkpoint.Checkpoint.fingerprint`.
        layout: dimensions and method.
        model_type: of the source's config.
        moe_layers: indices of the layers to convert.
        quantizer: settings of the quantiser that decide the bytes of the output.
        origin: ``repo_id`` and ``revision`` of the source if the download recorded them.
        input_type: dtype of the source's expert weights, ``fp8``, ``bf16`` or ``fp16``.
    """

    fingerprint: str
    layout: PackedLayout
    model_type: str
    moe_layers: tuple[int, ...]
    quantizer: dict[str, str]
    input_type: str
    origin: dict[str, str] = field(default_factory=dict)

    def layer_metadata(self, layer_idx: int) -> dict[str, str]:
        """Metadata of a layer file, but for the checksums, which are known last."""
        return {
            **self.layout.metadata(layer_idx),
            "model_type": self.model_type,
            "quantizer": json.dumps(self.quantizer, sort_keys=True),
            "source_fingerprint": self.fingerprint,
            "source_repo_id": self.origin.get("repo_id", ""),
            "source_revision": self.origin.get("revision", ""),
        }

    def describe(self) -> dict[str, Any]:
        """The part of the manifest that does not change while layers are added."""
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "method": self.layout.method,
            "bits_per_weight": self.layout.bits_per_weight(),
            "model": {
                "model_type": self.model_type,
                "hidden_size": self.layout.hidden_size,
                "intermediate_size": self.layout.intermediate_size,
                "num_experts": self.layout.num_experts,
                "moe_layers": list(self.moe_layers),
            },
            "source": {
                "fingerprint": self.fingerprint,
                "input_type": self.input_type,
                **self.origin,
            },
            "quantizer": self.quantizer,
        }


@dataclass(frozen=True)
class LayerRecord:
    """A finished layer file: its name, size in bytes and SHA-256 of the whole file."""

    file: str
    bytes: int
    sha256: str


class Manifest:
    """The manifest of one output directory; :meth:`add` makes it durable at once."""

    def __init__(
        self, output: Path, identity: Identity, layers: dict[int, LayerRecord] | None = None
    ) -> None:
        self.path = output / MANIFEST_NAME
        self.identity = identity
        self.layers: dict[int, LayerRecord] = dict(layers or {})

    @classmethod
    def load(cls, output: Path, identity: Identity) -> Manifest:
        """Read the manifest of an earlier run, or start a new one.

        Raises:
            UserError: the directory holds something else; names both, or the file is damaged.
        """
        path = output / MANIFEST_NAME
        if not path.exists():
            return cls(output, identity)
        try:
            found = read_json(path)
            layers = {
                int(index): LayerRecord(str(rec["file"]), int(rec["bytes"]), str(rec["sha256"]))
                for index, rec in found["layers"].items()
            }
            _check_same(path, found, identity)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path} is not a manifest of this program: choose another --output, or delete it; "
                f"finished layers are recognised without it"
            ) from None
        return cls(output, identity, layers)

    @property
    def complete(self) -> bool:
        """Whether every layer is there."""
        return set(self.layers) == set(self.identity.moe_layers)

    def content(self) -> bytes:
        """The bytes of the file."""
        whole = {
            **self.identity.describe(),
            "complete": self.complete,
            "layers": {
                str(idx): {"file": rec.file, "bytes": rec.bytes, "sha256": rec.sha256}
                for idx, rec in sorted(self.layers.items())
            },
        }
        return (json.dumps(whole, indent=1) + "\n").encode()

    def add(self, layer_idx: int, record: LayerRecord) -> None:
        """Record a finished layer."""
        self.layers[layer_idx] = record
        self.save()

    def save(self) -> None:
        """Write the manifest if it says anything that the file does not say yet."""
        content = self.content()
        if self.path.exists():
            if self.path.read_bytes() != content:
                replace_file(self.path, content)
        elif self.layers:
            replace_file(self.path, content)


def _check_same(path: Path, found: dict[str, Any], identity: Identity) -> None:
    wanted = identity.describe()
    if found["format"] != wanted["format"]:
        raise ValueError(found["format"])
    if found["method"] != wanted["method"]:
        raise UserError(
            f"{path.parent} holds {found['method']} weights, --quant-method is "
            f"{wanted['method']}: choose another --output for them"
        )
    if found["source"]["fingerprint"] != wanted["source"]["fingerprint"]:
        raise UserError(
            f"{path.parent} holds the weights of another checkpoint, "
            f"{_name_source(found)}, the source is {_name_source(wanted)}: choose another --output "
            f"or delete this one"
        )
    for key in ("format_version", "quantizer", "model"):
        if found[key] != wanted[key]:
            raise UserError(
                f"{path.parent} was made with {key} {json.dumps(found[key])}, this run has "
                f"{json.dumps(wanted[key])}: choose another --output or delete this one"
            )


def _name_source(description: dict[str, Any]) -> str:
    """A checkpoint in a few words: where it came from, or its dimensions, and its fingerprint."""
    source, model = description["source"], description["model"]
    if "repo_id" in source:
        name = f"{source['repo_id']} at {source.get('revision', 'an unknown revision')}"
    else:
        name = (
            f"{model['model_type']} with {len(model['moe_layers'])} MoE layers of "
            f"{model['num_experts']} experts, hidden size {model['hidden_size']}"
        )
    return f"{name} (fingerprint {source['fingerprint'][:12]})"
