"""Read access to a Hugging Face checkpoint directory.

Tensor data is read with ``pread`` and not through a memory map: a shard that shrinks or a disk that
fails is then an error with a name, where a map would end the process with SIGBUS; and what was read
does not stay in this process's resident memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.source.config import CONFIG_NAME, ModelConfig, ModelDims
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import (
    FileMissing,
    open_regular,
    read_fields,
    read_file,
    read_start,
    shown,
)
from kt_kernel.files.names import PLAIN, is_plain
from kt_kernel.files.safetensors_header import (
    LARGEST_HEADER,
    Header,
    TensorEntry,
    raw_type,
    read_header,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """An opened checkpoint directory; safe to read from several threads.

    Opening reads ``config.json``, the index and the header of every shard, no tensor data, and
    checks that every shard is there in full.

    Args:
        path: directory with ``config.json`` and ``model.safetensors.index.json`` (or one
            ``model.safetensors``).

    Raises:
        UserError: something is missing, truncated or not what it should be; names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"--input-path {self.path} does not exist")
        if not self.path.is_dir():
            raise UserError(f"--input-path {self.path} is not a directory: expected a checkpoint's")
        self.config_path = self.path / CONFIG_NAME
        try:
            self.dims: ModelDims = ModelConfig(self.path).dims()
        except FileMissing as error:
            raise UserError(
                f"{error}: --input-path must be the directory of a downloaded checkpoint"
            ) from None
        self.index_path = self.path / INDEX_NAME
        self._headers: dict[str, Header] = {}
        self._weight_map = self._read_weight_map()
        for shard in self.shards:
            self._headers[shard] = self._read_shard_header(shard)
        if not self.index_path.exists():
            self._weight_map = dict.fromkeys(self._headers[SINGLE_NAME].tensors, SINGLE_NAME)
        self._files: dict[str, int] = {}
        self._files_lock = threading.Lock()

    def _read_weight_map(self) -> dict[str, str]:
        if not self.index_path.exists():
            if (self.path / SINGLE_NAME).exists():
                self._shards = [SINGLE_NAME]
                return {}
            raise UserError(
                f"{self.path} has neither {INDEX_NAME} nor {SINGLE_NAME}: download the checkpoint "
                f"to the end first"
            )
        index = read_fields(self.index_path, LARGEST_HEADER, "download it again")
        weight_map = index.texts("weight_map", {})
        if not weight_map:
            raise UserError(f"{self.index_path} has no weight_map: download it again")
        for name, shard in weight_map.items():
            if not is_plain(shard):
                raise UserError(
                    f"{self.index_path}: {shown(name)} is in {shown(shard)}, expected {PLAIN}, in "
                    f"the same directory"
                )
        self._shards = sorted(set(weight_map.values()))
        return weight_map

    def _read_shard_header(self, shard: str) -> Header:
        path = self.path / shard
        try:
            header = read_header(path)
        except FileMissing as error:
            named_in = f", but {INDEX_NAME} names it" if self.index_path.exists() else ""
            raise UserError(f"{error}{named_in}: run the download again") from None
        except UserError as error:
            raise UserError(f"{error} (a shard of the checkpoint: download it again)") from None
        if header.file_size != header.data_end:
            raise UserError(
                f"{path} has {header.file_size} bytes, its header describes {header.data_end}: "
                f"download it again"
            )
        return header

    @property
    def shards(self) -> list[str]:
        """File names of the shards, sorted."""
        return self._shards

    @property
    def names(self) -> list[str]:
        """Names of all tensors that the index lists."""
        return list(self._weight_map)

    def shard_of(self, name: str) -> Path | None:
        """Path of the shard that the index gives for a tensor, None if it lists no such tensor."""
        shard = self._weight_map.get(name)
        return None if shard is None else self.path / shard

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor.

        Raises:
            UserError: the index does not list it, or its shard does not hold it.
        """
        shard = self._weight_map.get(name)
        if shard is None:
            where = self.index_path if self.index_path.exists() else self.path / SINGLE_NAME
            raise UserError(f"{where} lists no tensor {name}: the checkpoint is not complete")
        entry = self._headers[shard].tensors.get(name)
        if entry is None:
            raise UserError(
                f"{self.path / shard} holds no tensor {name}, but {INDEX_NAME} says so: download "
                f"both files again"
            )
        return entry

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes."""
        entry = self.entry(name)
        return entry.end - entry.begin

    def position(self, name: str) -> tuple[str, int]:
        """(shard, byte offset) of a tensor: reading in this order is reading sequentially."""
        return self._weight_map[name], self.entry(name).begin

    def fetch(self, name: str) -> None:
        """Let the kernel begin to read a tensor that is wanted soon."""
        entry = self.entry(name)
        with contextlib.suppress(OSError, UserError):  # advice only: reading says what is wrong
            fd = self._file(self._weight_map[name])
            os.posix_fadvise(fd, entry.begin, entry.end - entry.begin, os.POSIX_FADV_WILLNEED)

    def drop(self, name: str) -> None:
        """Let the kernel forget a tensor: the page cache is wanted for what comes next."""
        entry = self.entry(name)
        with contextlib.suppress(OSError, UserError):
            fd = self._file(self._weight_map[name])
            os.posix_fadvise(fd, entry.begin, entry.end - entry.begin, os.POSIX_FADV_DONTNEED)

    def read(self, name: str) -> np.ndarray:
        """Raw bits of a tensor, of its dtype's :func:`raw_type`.

        Raises:
            UserError: the tensor is not there, or the disk or the file gave less than it should.
        """
        entry = self.entry(name)
        shard = self._weight_map[name]
        data = np.empty(entry.end - entry.begin, dtype=np.uint8)
        view = data.data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._file(shard), [view[done:]], entry.begin + done)
            except OSError as error:
                raise UserError(
                    f"cannot read {name} from {self.path / shard}: {error.strerror}"
                ) from None
            if count == 0:
                raise UserError(
                    f"{self.path / shard} became shorter while it was being converted: {name} "
                    f"ends at byte {entry.end}"
                )
            done += count
        values: np.ndarray = data.view(raw_type(entry.dtype)).reshape(entry.shape)
        return values

    def _file(self, shard: str) -> int:
        with self._files_lock:
            if shard not in self._files:
                self._files[shard] = open_regular(self.path / shard)
            return self._files[shard]

    def fingerprint(self) -> str:
        """SHA-256 that identifies the checkpoint without reading its data.

        Taken over the bytes of ``config.json`` and of the index, and over the name, size and
        header of every shard.
        """
        digest = hashlib.sha256()
        for name, size, content in self._identifying_parts():
            label = name if size is None else f"{name}\0{size}"
            # With its length, so that no two different lists of parts are the same byte string.
            digest.update(f"{label}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def file_digests(self) -> dict[str, str]:
        """File -> SHA-256 of what :meth:`fingerprint` covers of it, to name those that differ."""
        return {
            name: hashlib.sha256(
                content + (b"" if size is None else str(size).encode())
            ).hexdigest()
            for name, size, content in self._identifying_parts()
        }

    def _identifying_parts(self) -> Iterator[tuple[str, int | None, bytes]]:
        """Name of each file, its size if it is a shard, and its bytes, of a shard the header's."""
        yield CONFIG_NAME, None, read_file(self.config_path)
        if self.index_path.exists():
            yield INDEX_NAME, None, read_file(self.index_path, LARGEST_HEADER)
        for shard in self.shards:
            header = self._headers[shard]
            yield shard, header.file_size, read_start(self.path / shard, header.data_start)

    def close(self) -> None:
        """Close the shards."""
        with self._files_lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
