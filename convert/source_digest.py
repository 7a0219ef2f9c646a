"""Digests of the source bytes that a layer is made from, one for each shard that has some.

With them a shard that changes after a layer was made is found and named, and only its layers are
converted again.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from convert.source.checkpoint import Checkpoint
from convert.workers import StopRequest, run_all


class SourceDigest:
    """Collects the tensors of one layer, in any order, from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, bits: np.ndarray) -> None:
        """Take in a tensor as it was read."""
        digest = hashlib.sha256(bits.data.cast("B")).hexdigest()
        with self._lock:
            self._tensors[name] = digest

    def by_shard(self) -> dict[str, str]:
        """Shard -> SHA-256 over the names and SHA-256 of its tensors, in the order of names."""
        shards: dict[str, hashlib._Hash] = {}
        for name, digest in sorted(self._tensors.items()):
            shard, _ = self._checkpoint.position(name)
            shards.setdefault(shard, hashlib.sha256()).update(f"{name} {digest}\n".encode())
        return {shard: shards[shard].hexdigest() for shard in sorted(shards)}


def read_source_digest(
    checkpoint: Checkpoint,
    names: Collection[str],
    pool: ThreadPoolExecutor,
    stop: StopRequest,
) -> dict[str, str]:
    """Read tensors for their digest alone; the result is :meth:`SourceDigest.by_shard`'s.

    Raises:
        UserError: a tensor cannot be read.
    """
    digest = SourceDigest(checkpoint)

    def read(name: str) -> None:
        digest.add(name, checkpoint.read(name))

    run_all(pool, [functools.partial(read, name) for name in names], stop)
    return digest.by_shard()
