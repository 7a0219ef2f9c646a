"""The output directory: who may write to it, and what earlier runs left in it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert import locks
from convert.manifest import Identity, Manifest
from convert.manifest_file import LayerRecord
from convert.workers import StopRequest
from convert.writer import (
    CHECKSUMS_KEY,
    TEMPORARY_SUFFIX,
    file_bytes,
    hash_range,
    read_digests,
)
from kt_kernel.errors import UserError
from kt_kernel.files.durable import CREATE, named_write_errors, sync_directory, write_error
from kt_kernel.files.safetensors_header import Header, read_header
from kt_kernel.packed import METHODS, check_layer_header, layer_file_name

LOCK_NAME = ".convert.lock"
_LAYER_FILE = re.compile(r"^layer-(\d{3,})\.safetensors$")
_TEMPORARY = re.compile(
    r"^(layer-\d{3,}\.safetensors|manifest\.json)" + re.escape(TEMPORARY_SUFFIX)
)


class OutputDirectory:
    """Context manager that creates and locks an output directory.

    Leaving removes the lock file, and the directory if it was made here and is empty.

    A directory that cannot be written, on a read-only or full file system or of another user, is
    entered without a lock: a finished output needs neither. Whatever would write then raises.

    Args:
        path: the directory.
        shared: lets others in that share as well; what they convert is locked layer by layer.

    Raises:
        UserError: another conversion is writing to the directory, or it cannot be made.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self.path = path
        self.shared = shared
        self._lock_path = path / LOCK_NAME
        self._made: list[Path] = []
        self._fd = -1
        self._unwritable: UserError | None = None

    def __enter__(self) -> OutputDirectory:
        try:
            self._make()
            self._lock()
        except OSError as error:
            is_there = not self._made and os.access(self.path, os.R_OK | os.X_OK)
            self._remove_made()
            # The file system's reason, and whose: a lock that another user left is in the way.
            self._unwritable = write_error(Path(error.filename or self.path), error)
            if not is_there:
                raise self._unwritable from None
        except BaseException:
            self._remove_made()
            raise
        return self

    def require_writable(self) -> None:
        """Raises UserError if nothing can be written."""
        if self._unwritable is not None:
            raise self._unwritable

    def _make(self) -> None:
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        if self._made:
            sync_directory(self._made[-1].parent)

    def _lock(self) -> None:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | CREATE, 0o644)
            try:
                if not locks.try_lock(fd, locks.DIRECTORY, self.shared):
                    holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                    share = "" if self.shared else ", convert other --layers,"
                    raise UserError(
                        f"another conversion ({holder or 'just started'}) is writing to "
                        f"{self.path}: wait for it{share} or choose another --output"
                    )
                # The holder before us may have removed the file between our open and our lock.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(fd).st_ino == self._lock_path.stat().st_ino:
                        break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        self._fd = fd
        with contextlib.suppress(OSError):  # a full disk: only the name of the holder is missing
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            if locks.try_lock(self._fd, locks.DIRECTORY):  # the last one
                self._lock_path.unlink()
        os.close(self._fd)
        self._remove_made()

    @contextmanager
    def manifest_lock(self) -> Iterator[None]:
        """Held while the manifest is read and replaced."""
        self.require_writable()
        with named_write_errors(self._lock_path):
            locks.lock(self._fd, locks.MANIFEST)
        try:
            yield
        finally:
            locks.unlock(self._fd, locks.MANIFEST)

    @contextmanager
    def layer_lock(self, layer_idx: int) -> Iterator[bool]:
        """Lock a layer if no other process has it; gives whether it did."""
        if self._unwritable is not None:
            yield True  # to look at
            return
        byte = locks.layer_byte(layer_idx)
        with named_write_errors(self._lock_path):
            got = locks.try_lock(self._fd, byte)
        try:
            yield got
        finally:
            if got:
                locks.unlock(self._fd, byte)

    def _remove_made(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty: it holds what was converted
                path.rmdir()

    def remove_temporaries(self) -> None:
        """Remove what an interrupted run left half written; only for who has the directory."""
        if self._unwritable is not None:
            return
        with named_write_errors(self.path):
            for path in sorted(self.path.iterdir()):
                if _TEMPORARY.match(path.name):
                    path.unlink()

    def check_files(self, identity: Identity) -> None:
        """Check that every layer file is of this conversion; those that are damaged pass.

        Raises:
            UserError: a file belongs to another model, method or version.
        """
        for path in sorted(self.path.iterdir()):
            match = _LAYER_FILE.match(path.name)
            if not match:
                continue
            try:
                header = read_header(path)
            except UserError:
                continue
            reason = _foreign(header, identity, int(match[1]))
            if reason:
                raise UserError(f"{path} {reason}: choose another --output or delete that file")

    def find_problem(self, manifest: Manifest, layer_idx: int, stop: StopRequest) -> str | None:
        """Look at one layer's file, which nobody else may be writing.

        A file that the manifest does not list (the run ended between the rename and the manifest,
        or the manifest was deleted) is sound if its checksums are right.

        Returns:
            What is wrong with it; empty if it is sound, None if there is none and none was listed.
        """
        record = manifest.layers.get(layer_idx)
        path = self.path / layer_file_name(layer_idx)
        if not path.exists():
            return f"{path} is gone" if record else None
        try:
            header = read_header(path)
        except UserError as error:
            return str(error)
        return _check_file(header, manifest.identity, layer_idx, record, stop)


def _foreign(header: Header, identity: Identity, layer_idx: int) -> str:
    """Why a layer file does not belong to this conversion; empty if it does."""
    if layer_idx not in identity.moe_layers:
        return "is of a layer that the source does not have"
    expected = identity.layer_metadata(layer_idx)
    found = header.metadata
    if not _is_nearly(found.get("format"), expected["format"]):
        return "is not a packed expert file"
    if found.get("method") != expected["method"] and found.get("method") in METHODS:
        return f"holds {found['method']} weights, --quant-method is {expected['method']}"
    if not _is_nearly(found.get("source_fingerprint"), expected["source_fingerprint"]):
        return (
            f"holds weights of another checkpoint (fingerprint "
            f"{found.get('source_fingerprint', 'missing')[:12]}, the source has "
            f"{expected['source_fingerprint'][:12]})"
        )
    for key in ("format_version", "quantizer", "layer_idx"):
        if found.get(key) != expected[key]:
            return f"has {key} {found.get(key)}, this run has {expected[key]}"
    return ""


def _is_nearly(found: str | None, expected: str) -> bool:
    """Whether a name or digest is the expected one, but perhaps for a damaged byte or two.

    Another file's differs in most characters; a damaged file is this program's to make again.
    """
    if found is None or len(found) != len(expected):
        return False
    return sum(a != b for a, b in zip(found, expected, strict=True)) <= 2


def _check_file(
    header: Header,
    identity: Identity,
    layer_idx: int,
    record: LayerRecord | None,
    stop: StopRequest,
) -> str:
    """What is wrong with a layer file of this conversion; empty if nothing is."""
    size = file_bytes(identity.layout, identity.layer_metadata(layer_idx))
    if record is not None:
        size = record.bytes
    if header.file_size != size:
        return f"{header.path} has {header.file_size} bytes, expected {size}"
    try:
        check_layer_header(header, identity.layout, layer_idx)
        if header.metadata.get("source_fingerprint") != identity.fingerprint:
            return f"{header.path} has a damaged source_fingerprint"
        return check_sums(header, stop) if record is None else ""
    except UserError as error:
        return str(error)


def check_sums(header: Header, stop: StopRequest) -> str:
    """Compare every tensor with its checksum; the first that differs, or empty.

    Raises:
        UserError: the file cannot be read, or its checksums are damaged.
    """
    checksums = read_digests(header, CHECKSUMS_KEY)
    try:
        with header.path.open("rb") as file:
            for name, entry in header.tensors.items():
                found = hash_range(file.fileno(), entry.begin, entry.end, stop)
                if found != checksums.get(name):
                    return f"{header.path}: tensor {name} does not match its checksum"
    except OSError as error:
        raise UserError(f"cannot read {header.path}: {error.strerror}") from None
    return ""
