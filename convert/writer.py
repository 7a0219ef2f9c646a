"""Writes one layer file piece by piece, in any order, from several threads.

The public safetensors library can only write a file from tensors that are all in memory; a layer of
V3.2 has 5.8 GB. The sizes are known beforehand, so the file is allocated in full, each expert's
slice goes to its place, and the header, which carries the checksums, comes last: until then the
file is not readable as safetensors at all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from convert.workers import StopRequest, run_all
from kt_kernel.errors import UserError
from kt_kernel.files.durable import CREATE, named_write_errors, sync_directory, write_fully
from kt_kernel.files.foreign import Fields, parse_json
from kt_kernel.files.safetensors_header import Header, header_bytes, raw_type
from kt_kernel.packed import PackedLayout

TEMPORARY_SUFFIX = ".tmp"
#: Metadata key of the checksums: JSON, tensor name -> SHA-256 of the tensor's bytes.
CHECKSUMS_KEY = "tensor_sha256"
#: Metadata key of the source's digests: JSON, shard -> :meth:`SourceDigest.by_shard`'s value.
SOURCE_KEY = "source_sha256"
#: Stands for a digest while it is not known; of the same length.
BLANK_DIGEST = "0" * 64

_CHUNK = 8 << 20


def layer_header(
    layout: PackedLayout, metadata: dict[str, str], checksums: dict[str, str]
) -> bytes:
    """The file's bytes before the tensor data; their number does not depend on the checksums."""
    return header_bytes(layout.tensors(), {**metadata, CHECKSUMS_KEY: json.dumps(checksums)})


def file_bytes(layout: PackedLayout, metadata: dict[str, str]) -> int:
    """Size in bytes of the layer file."""
    blank = dict.fromkeys(layout.tensors(), BLANK_DIGEST)
    data = sum(spec.nbytes for spec in layout.tensors().values())
    return len(layer_header(layout, metadata, blank)) + data


def read_digests(header: Header, key: str) -> dict[str, str]:
    """What a layer file's metadata says under ``CHECKSUMS_KEY`` or ``SOURCE_KEY``.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = parse_json(header.metadata.get(key, ""))
        return Fields({key: found}, str(header.path)).texts(key)
    except (ValueError, UserError):
        raise UserError(f"{header.path}: {key} in its metadata is damaged") from None


def hash_range(fd: int, begin: int, end: int, stop: StopRequest) -> str:
    """SHA-256 of a byte range of a file.

    Raises:
        Stopped: a stop was requested meanwhile.
        OSError: reading failed, or the file ends before ``end``.
    """
    digest = hashlib.sha256()
    buffer = bytearray(min(_CHUNK, max(1, end - begin)))
    view = memoryview(buffer)
    while begin < end:
        stop.check()
        count = os.preadv(fd, [view[: min(len(view), end - begin)]], begin)
        if count == 0:
            raise OSError(errno.EIO, "the file is shorter than it should be")
        digest.update(view[:count])
        begin += count
    return digest.hexdigest()


def hash_file(path: Path, stop: StopRequest) -> str:
    """SHA-256 of a whole file; raises as :func:`hash_range`."""
    with path.open("rb") as file:
        return hash_range(file.fileno(), 0, os.fstat(file.fileno()).st_size, stop)


class LayerWriter:
    """Context manager around ``<final name>.tmp``; leaving it unpublished removes the file.

    Args:
        final: path the file gets when it is published.
        layout: dimensions and method of the layer.
        metadata: the header's metadata but for the checksums, with blank digests of the source.

    Raises:
        UserError: no space, or the file cannot be written.
    """

    def __init__(self, final: Path, layout: PackedLayout, metadata: dict[str, str]) -> None:
        self.final = final
        self.temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
        self._layout = layout
        self._metadata = metadata
        self._specs = layout.tensors()
        self.size = file_bytes(layout, metadata)
        offset = self.size - sum(spec.nbytes for spec in self._specs.values())
        self._begins: dict[str, int] = {}
        for name, spec in self._specs.items():
            self._begins[name] = offset
            offset += spec.nbytes
        self._missing = {
            (name, expert)
            for name, spec in self._specs.items()
            for expert in (range(layout.num_experts) if name != "tables" else (-1,))
        }
        self._missing_lock = threading.Lock()
        self._fd = -1
        self._published = False

    def __enter__(self) -> LayerWriter:
        with named_write_errors(self.final):
            try:
                self._fd = os.open(self.temporary, os.O_RDWR | os.O_TRUNC | CREATE, 0o644)
                self._allocate()
            except OSError:
                self._discard()
                raise
        return self

    def _allocate(self) -> None:
        try:
            # Takes the blocks now: a full disk is found before the work and not after it.
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._fd, self.size)

    def write_expert(self, name: str, expert: int, values: np.ndarray) -> None:
        """Write one expert's slice of a tensor; may be called from any thread, once per slice."""
        spec = self._specs[name]
        self._write(name, expert, values, spec.shape[1:], expert * spec.nbytes // spec.shape[0])

    def write_tensor(self, name: str, values: np.ndarray) -> None:
        """Write a tensor that is not per expert: ``tables``."""
        self._write(name, -1, values, self._specs[name].shape, 0)

    def _write(
        self, name: str, expert: int, values: np.ndarray, shape: tuple[int, ...], offset: int
    ) -> None:
        dtype = np.dtype(raw_type(self._specs[name].dtype))
        if values.shape != shape or values.dtype.itemsize != dtype.itemsize:
            raise RuntimeError(
                f"{name}: got {values.dtype} {values.shape}, the layout says {dtype} {shape}"
            )
        with self._missing_lock:
            self._missing.remove((name, expert))
        raw = np.ascontiguousarray(values).data.cast("B")
        with named_write_errors(self.final):
            begin = self._begins[name] + offset
            write_fully(self._fd, raw, begin)
        with contextlib.suppress(OSError):
            # Linux begins to write what is dirty, so that the flush at the end finds little left.
            os.posix_fadvise(self._fd, begin, len(raw), os.POSIX_FADV_DONTNEED)

    def seal(
        self, pool: ThreadPoolExecutor, stop: StopRequest, source: dict[str, str] | None = None
    ) -> None:
        """Write the header with the checksums and flush the file to the disk.

        Args:
            pool: hashes.
            stop: asked meanwhile.
            source: digest of each shard's part of the layer, in place of the blank ones.

        Raises:
            UserError: writing or flushing failed.
            RuntimeError: a slice was never written.
        """
        if self._missing:
            raise RuntimeError(f"{self.final}: never written: {sorted(self._missing)[:3]} ...")
        checksums: dict[str, str] = dict.fromkeys(self._specs, "")

        def hash_tensor(name: str) -> None:
            begin = self._begins[name]
            checksums[name] = hash_range(self._fd, begin, begin + self._specs[name].nbytes, stop)

        with named_write_errors(self.final):
            run_all(pool, [functools.partial(hash_tensor, name) for name in self._specs], stop)
            metadata = dict(self._metadata)
            if source is not None:
                metadata[SOURCE_KEY] = json.dumps(source)
            header = layer_header(self._layout, metadata, checksums)
            if len(header) != self.size - sum(spec.nbytes for spec in self._specs.values()):
                raise RuntimeError(f"{self.final}: the digests {source} are not those announced")
            write_fully(self._fd, memoryview(header), 0)
            os.fsync(self._fd)

    def publish(self) -> None:
        """Give the file its final name, durably."""
        with named_write_errors(self.final):
            self.temporary.replace(self.final)
            self._published = True
            sync_directory(self.final.parent)

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not self._published:
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self._discard()
