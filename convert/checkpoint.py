"""Read access to a Hugging Face checkpoint directory.

Tensor data is read with ``pread`` and not through a memory map: a shard that shrinks or a disk that
fails is then an error with a name, where a map would end the process with SIGBUS; and what was read
does not stay in this process's resident memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.model_config import ModelDims, read_model_dims
from kt_kernel.errors import UserError
from kt_kernel.files import FileMissing, open_regular, read_fields, read_file, read_start, shown
from kt_kernel.packed import LARGEST_HEADER, PROJECTIONS, Header, TensorEntry, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: Written by the download stage; says which repository and revision the directory holds.
DOWNLOAD_MARKER = ".kt-download.json"

#: safetensors dtype -> numpy type of its raw bits (numpy knows neither FP8 nor bf16).
RAW_BITS = {
    "F8_E4M3": np.uint8,
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.float32,
    "I32": np.int32,
    "I64": np.int64,
}

_EXPERT_NAME = re.compile(r"model\.layers\.([0-9]+)\.mlp\.experts\.([0-9]+)\.(.+)", re.DOTALL)
#: More digits than any index has, and fewer than Python refuses to read.
_DIGITS = 18


def weight_name(layer_idx: int, expert: int, projection: str) -> str:
    """Name of a routed expert's weight; ``projection`` is ``gate``, ``up`` or ``down``."""
    return f"model.layers.{layer_idx}.mlp.experts.{expert}.{projection}_proj.weight"


def scale_name(layer_idx: int, expert: int, projection: str) -> str:
    """Name of the FP8 block scales that belong to :func:`weight_name`."""
    return weight_name(layer_idx, expert, projection) + "_scale_inv"


def parse_expert_name(name: str) -> tuple[int, int, str] | None:
    """(layer, expert, rest of the name) of a routed expert's tensor, None for any other tensor."""
    match = _EXPERT_NAME.fullmatch(name)
    return (int(match[1][:_DIGITS]), int(match[2][:_DIGITS]), match[3]) if match else None


@dataclass(frozen=True)
class ExpertProjection:
    """One projection matrix of one routed expert."""

    layer_idx: int
    expert: int
    projection: str

    @property
    def weight(self) -> str:
        return weight_name(self.layer_idx, self.expert, self.projection)

    @property
    def scale(self) -> str:
        return scale_name(self.layer_idx, self.expert, self.projection)

    def tensors(self, input_type: str) -> tuple[str, ...]:
        """Names of the tensors that hold the matrix in a checkpoint of this ``--input-type``.

        The weights come first, their scales second.
        """
        if input_type == "int4":
            return tuple(f"{self.weight}_{part}" for part in ("packed", "scale", "shape"))
        return (self.weight, self.scale) if input_type == "fp8" else (self.weight,)


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
            self.dims: ModelDims = read_model_dims(self.config_path)
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
            if Path(shard).name != shard or shard == "..":
                raise UserError(
                    f"{self.index_path}: {name} is in {shown(shard)}, expected the name of a file "
                    f"in the same directory"
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
        """Raw bits of a tensor, of the type in ``RAW_BITS``.

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
        return data.view(RAW_BITS[entry.dtype]).reshape(entry.shape)

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

    def layer_tensors(self, layer_idx: int, input_type: str) -> dict[str, list[str]]:
        """Shard -> the tensors of a layer's routed experts that it holds, in file order."""
        shards: dict[str, list[str]] = {}
        for item in self.expert_projections(layer_idx, input_type):
            for name in item.tensors(input_type):
                shards.setdefault(self.position(name)[0], []).append(name)
        return {shard: sorted(shards[shard], key=self.position) for shard in sorted(shards)}

    def origin(self) -> dict[str, str]:
        """Repository and revision that the download stage recorded; empty if it did not.

        Raises:
            UserError: the download stage says that it is not finished.
        """
        try:
            recorded = read_fields(self.path / DOWNLOAD_MARKER, advice="run the download again")
        except FileMissing:
            return {}
        if not recorded.flag("complete", True):
            raise UserError(
                f"the download of {self.path} is not finished, {self.path / DOWNLOAD_MARKER} "
                f"says: run it again first"
            )
        origin = {key: recorded.text(key, "") for key in ("repo_id", "revision")}
        return {key: value for key, value in origin.items() if value}

    def expert_projections(self, layer_idx: int, input_type: str) -> list[ExpertProjection]:
        """Every routed expert's projections of a layer, in the order they lie in the shards."""
        wanted = [
            ExpertProjection(layer_idx, expert, projection)
            for expert in range(self.dims.num_experts)
            for projection in PROJECTIONS
        ]
        return sorted(wanted, key=lambda item: self.position(item.tensors(input_type)[0]))

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
