"""``manifest.json``: what an output directory holds and how far the conversion got.

Nothing in it depends on time, host or path, so two conversions of the same checkpoint have the same
manifest. Several processes may add layers to it: each change is read, merged and replaced under a
lock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.durable import replace_file
from convert.model_config import read_json
from convert.writer import BLANK_DIGEST, SOURCE_KEY
from kt_kernel.errors import UserError
from kt_kernel.packed import FORMAT_NAME, FORMAT_VERSION, MANIFEST_NAME, PackedLayout

#: Key of the manifest's own SHA-256, over the JSON of all other keys.
DIGEST_KEY = "manifest_sha256"


@dataclass(frozen=True)
class Identity:
    """What makes two conversions the same; layers of different identity never share a directory.

    Attributes:
        fingerprint: of the source, :meth:`convert.checkpoint.Checkpoint.fingerprint`.
        layout: dimensions and method.
        model_type: of the source's config.
        moe_layers: indices of the layers to convert.
        quantizer: settings of the quantiser that decide the bytes of the output.
        input_type: dtype of the source's expert weights, ``fp8``, ``bf16`` or ``fp16``.
        files: digests of the parts of the fingerprint, to name the file that differs.
        shards: layer -> the shards that hold its experts.
        origin: ``repo_id`` and ``revision`` of the source if the download recorded them.
    """

    fingerprint: str
    layout: PackedLayout
    model_type: str
    moe_layers: tuple[int, ...]
    quantizer: dict[str, str]
    input_type: str
    files: dict[str, str]
    shards: dict[int, tuple[str, ...]]
    origin: dict[str, str] = field(default_factory=dict)

    def layer_metadata(self, layer_idx: int) -> dict[str, str]:
        """Metadata of a layer file, but for the checksums and digests, which are known last."""
        return {
            **self.layout.metadata(layer_idx),
            "model_type": self.model_type,
            "quantizer": json.dumps(self.quantizer, sort_keys=True),
            "source_fingerprint": self.fingerprint,
            "source_repo_id": self.origin.get("repo_id", ""),
            "source_revision": self.origin.get("revision", ""),
            SOURCE_KEY: json.dumps(dict.fromkeys(self.shards[layer_idx], BLANK_DIGEST)),
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
                "files": self.files,
            },
            "quantizer": self.quantizer,
        }


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


class Manifest:
    """The manifest of one output directory; every change is durable at once.

    Args:
        output: the directory.
        identity: what is converted, and how.
        locked: held while the file is read and replaced.
    """

    def __init__(
        self,
        output: Path,
        identity: Identity,
        locked: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.path = output / MANIFEST_NAME
        self.identity = identity
        self._locked = locked
        self.layers: dict[int, LayerRecord] = {}

    def load(self) -> None:
        """Take what the file says, if there is one.

        Raises:
            UserError: the directory holds something else; names both, or the file is damaged.
        """
        if not self.path.exists():
            self.layers = {}
            return
        found = read_manifest(self.path)
        self.layers = read_layers(self.path, found)
        try:
            _check_same(self.path, found, self.identity)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _not_a_manifest(self.path) from None

    @property
    def complete(self) -> bool:
        """Whether every layer is there."""
        return set(self.layers) == set(self.identity.moe_layers)

    def content(self) -> bytes:
        """The bytes of the file."""
        whole = {
            **self.identity.describe(),
            "complete": self.complete,
            "layers": {str(idx): asdict(record) for idx, record in sorted(self.layers.items())},
        }
        whole[DIGEST_KEY] = _digest(whole)
        return (json.dumps(whole, indent=1) + "\n").encode()

    def update(
        self, add: Mapping[int, LayerRecord] | None = None, drop: Collection[int] = ()
    ) -> None:
        """Record finished layers and forget others, keeping what other processes recorded."""
        with self._locked():
            self.load()
            for layer_idx in drop:
                self.layers.pop(layer_idx, None)
            self.layers.update(add or {})
            content = self.content()
            if self.path.exists():
                if self.path.read_bytes() != content:
                    replace_file(self.path, content)
            elif self.layers:
                replace_file(self.path, content)


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != DIGEST_KEY}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Parse a manifest and check it against its digest.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = read_json(path)
    except UserError:
        raise _not_a_manifest(path) from None
    if DIGEST_KEY in found and found[DIGEST_KEY] != _digest(found):
        raise UserError(
            f"{path} has changed since it was written: delete it, finished layers are recognised "
            f"without it"
        )
    return found


def read_layers(path: Path, found: dict[str, Any]) -> dict[int, LayerRecord]:
    """The records of a parsed manifest.

    Raises:
        UserError: it is not a manifest of this program.
    """
    try:
        return {
            int(index): LayerRecord(
                file=str(record["file"]),
                bytes=int(record["bytes"]),
                sha256=str(record["sha256"]),
                source={str(k): str(v) for k, v in record.get("source", {}).items()},
                errors={str(k): float(v) for k, v in record.get("errors", {}).items()},
            )
            for index, record in found["layers"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _not_a_manifest(path) from None


def _not_a_manifest(path: Path) -> UserError:
    return UserError(
        f"{path} is not a manifest of this program: choose another --output, or delete it; "
        f"finished layers are recognised without it"
    )


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
            f"{_name_source(found)}, the source is {_name_source(wanted)}"
            f"{_name_files(found, identity)}: choose another --output or delete this one"
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


def _name_files(found: dict[str, Any], identity: Identity) -> str:
    changed = changed_files(found, identity.files)
    return f"; what differs is {changed}" if changed else ""


def changed_files(found: dict[str, Any], files: dict[str, str]) -> str:
    """The files by which a source differs from a parsed manifest's; empty if the lists differ.

    Args:
        found: the manifest.
        files: :meth:`convert.checkpoint.Checkpoint.file_digests` of the source.
    """
    recorded = found["source"].get("files", {})
    if recorded.keys() != files.keys():
        return ""
    differ = [name for name, digest in files.items() if recorded[name] != digest]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return ", ".join(differ[:3]) + more
