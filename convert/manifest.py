"""``manifest.json``: what an output directory holds and how far the conversion got.

Nothing in it depends on time, host or path, so two conversions of the same checkpoint have the same
manifest. Several processes may add layers to it: each change is read, merged and replaced under a
lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.manifest_file import (
    DIGEST_KEY,
    Damaged,
    Description,
    LayerRecord,
    digest_of,
    read_description,
    read_layers,
    read_manifest,
)
from convert.writer import BLANK_DIGEST, SOURCE_KEY
from kt_kernel.errors import UserError
from kt_kernel.files.durable import replace_file
from kt_kernel.files.foreign import FileMissing, read_file
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.packed import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PackedLayout,
    layer_file_name,
)


@dataclass(frozen=True)
class Identity:
    """What makes two conversions the same; layers of different identity never share a directory.

    Attributes:
        fingerprint: of the source, :meth:`convert.source.checkpoint.Checkpoint.fingerprint`.
        layout: dimensions and method.
        model_type: of the source's config.
        moe_layers: indices of the layers to convert.
        quantizer: settings of the quantiser that decide the bytes of the output.
        input_type: dtype of the source's expert weights, a name of ``FORMATS``.
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

    def load(self) -> str:
        """Take what the file says, if there is one.

        A damaged one counts as none where the layer files show that it is this program's: they
        say what it said.

        Returns:
            What is wrong with the file; empty if nothing is.

        Raises:
            UserError: the directory holds something else; names both.
        """
        self.layers = {}
        try:
            found = read_manifest(self.path)
            layers = read_layers(found)
            _check_same(self.path, read_description(found), self.identity)
        except FileMissing:
            return ""
        except Damaged as damage:
            if self._has_layer_files():
                return damage.reason
            raise
        self.layers = layers
        return ""

    def _has_layer_files(self) -> bool:
        """Whether a layer file of this conversion lies beside the manifest."""
        for layer_idx in self.identity.moe_layers:
            try:
                header = read_header(self.path.parent / layer_file_name(layer_idx))
            except UserError:
                continue
            if header.metadata.get("source_fingerprint") == self.identity.fingerprint:
                return True
        return False

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
        whole[DIGEST_KEY] = digest_of(whole)
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
            try:
                current = read_file(self.path)
            except FileMissing:
                current = None
            if current != content and (current is not None or self.layers):
                replace_file(self.path, content)


def _check_same(path: Path, found: Description, identity: Identity) -> None:
    if found.layout.method != identity.layout.method:
        raise UserError(
            f"{path.parent} holds {found.layout.method} weights, --quant-method is "
            f"{identity.layout.method}: choose another --output for them"
        )
    if found.fingerprint != identity.fingerprint:
        changed = changed_files(found, identity.files)
        raise UserError(
            f"{path.parent} holds the weights of another checkpoint, "
            f"{_name_source(found)}, the source is {_name_source(identity)}"
            f"{f'; what differs is {changed}' if changed else ''}: choose another --output or "
            f"delete this one"
        )
    for key in ("quantizer", "layout", "model_type", "moe_layers"):
        theirs, ours = getattr(found, key), getattr(identity, key)
        if theirs != ours:
            raise UserError(
                f"{path.parent} was made with {key} {theirs}, this run has {ours}: choose another "
                f"--output or delete this one"
            )


def _name_source(made: Description | Identity) -> str:
    """A checkpoint in a few words: where it came from, or its dimensions, and its fingerprint."""
    if "repo_id" in made.origin:
        name = f"{made.origin['repo_id']} at {made.origin.get('revision', 'an unknown revision')}"
    else:
        name = (
            f"{made.model_type} with {len(made.moe_layers)} MoE layers of "
            f"{made.layout.num_experts} experts, hidden size {made.layout.hidden_size}"
        )
    return f"{name} (fingerprint {made.fingerprint[:12]})"


def changed_files(found: Description, files: dict[str, str]) -> str:
    """The files by which a source differs from a manifest's; empty if the lists differ.

    Args:
        found: what the manifest says.
        files: :meth:`convert.source.checkpoint.Checkpoint.file_digests` of the source.
    """
    if found.files.keys() != files.keys():
        return ""
    differ = [name for name, digest in files.items() if found.files[name] != digest]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return ", ".join(differ[:3]) + more
