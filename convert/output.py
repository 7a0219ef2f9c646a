"""The output directory: one converter at a time, and what earlier runs left in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

from convert.durable import named_write_errors, sync_directory
from convert.manifest import Identity, LayerRecord, Manifest
from convert.workers import StopRequest
from convert.writer import CHECKSUMS_KEY, TEMPORARY_SUFFIX, file_bytes, hash_range
from kt_kernel.errors import UserError
from kt_kernel.packed import (
    METHODS,
    Header,
    check_layer_header,
    layer_file_name,
    read_header,
)

LOCK_NAME = ".convert.lock"
_LAYER_FILE = re.compile(r"^layer-(\d{3,})\.safetensors$")
_TEMPORARY = re.compile(
    r"^(layer-\d{3,}\.safetensors|manifest\.json)" + re.escape(TEMPORARY_SUFFIX)
)


class OutputDirectory:
    """Context manager that creates and locks an output directory.

    The lock is the kernel's (``flock``), so it is gone with the process that held it, however that
    one ended. Leaving removes the lock file, and the directory if it was made here and is empty.

    Raises:
        UserError: another conversion is writing to the directory, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path / LOCK_NAME
        self._made: list[Path] = []
        self._fd = -1

    def __enter__(self) -> OutputDirectory:
        with named_write_errors(self.path):
            self._make()
        try:
            with named_write_errors(self._lock_path):
                self._lock()
        except BaseException:
            self._remove_made()
            raise
        return self

    def _make(self) -> None:
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._made = missing
        if missing:
            sync_directory(missing[-1].parent)

    def _lock(self) -> None:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                os.close(fd)
                raise UserError(
                    f"another conversion ({holder or 'just started'}) is writing to {self.path}: "
                    f"wait for it, or choose another --output"
                ) from None
            except BaseException:
                os.close(fd)
                raise
            # The holder before us may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == self._lock_path.stat().st_ino:
                    break
            os.close(fd)
        self._fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        os.close(self._fd)
        self._remove_made()

    def _remove_made(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty: it holds what was converted
                path.rmdir()

    def remove_temporaries(self) -> None:
        """Remove what an interrupted run left half written."""
        with named_write_errors(self.path):
            for path in sorted(self.path.iterdir()):
                if _TEMPORARY.match(path.name):
                    path.unlink()

    def survey(
        self, identity: Identity, stop: StopRequest, note: Callable[[str], None]
    ) -> Manifest:
        """Find the finished layers; those that are missing or damaged are dropped with a note.

        A layer file that the manifest does not list (the run ended between the rename and the
        manifest, or the manifest was deleted) counts if its checksums are right.

        Raises:
            UserError: a file belongs to another model, method or version; nothing is changed then.
        """
        manifest = Manifest.load(self.path, identity)
        found: dict[int, Header] = {}
        damaged: dict[int, str] = {}
        for path in sorted(self.path.iterdir()):
            match = _LAYER_FILE.match(path.name)
            if not match:
                continue
            layer_idx = int(match[1])
            try:
                header = read_header(path)
            except UserError as error:
                damaged[layer_idx] = str(error)
                continue
            reason = _foreign(header, identity, layer_idx)
            if reason:
                raise UserError(f"{path} {reason}: choose another --output or delete that file")
            found[layer_idx] = header
        self.remove_temporaries()
        for layer_idx in identity.moe_layers:
            record = manifest.layers.get(layer_idx)
            name = layer_file_name(layer_idx)
            if layer_idx in found:
                problem = _check_file(found[layer_idx], identity, layer_idx, record, stop)
            else:
                problem = damaged.get(layer_idx, f"{self.path / name} is gone" if record else "")
            if problem:
                note(f"{problem}; converting layer {layer_idx} again")
                manifest.layers.pop(layer_idx, None)
            elif layer_idx in found and record is None:
                manifest.layers[layer_idx] = _record(found[layer_idx], stop)
        return manifest


def _foreign(header: Header, identity: Identity, layer_idx: int) -> str:
    """Why a layer file does not belong to this conversion; empty if it does."""
    if layer_idx not in identity.moe_layers:
        return "is of a layer that the source does not have"
    expected = identity.layer_metadata(layer_idx)
    found = header.metadata
    if found.get("format") != expected["format"]:
        return "is not a packed expert file"
    if found.get("method") != expected["method"] and found.get("method") in METHODS:
        return f"holds {found['method']} weights, --quant-method is {expected['method']}"
    if found.get("source_fingerprint") != expected["source_fingerprint"]:
        return (
            f"holds weights of another checkpoint (fingerprint "
            f"{found.get('source_fingerprint', 'missing')[:12]}, the source has "
            f"{expected['source_fingerprint'][:12]})"
        )
    for key in ("format_version", "quantizer", "layer_idx"):
        if found.get(key) != expected[key]:
            return f"has {key} {found.get(key)}, this run has {expected[key]}"
    return ""


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
    except UserError as error:
        return str(error)
    if record is None:
        return _check_sums(header, stop)
    return ""


def _check_sums(header: Header, stop: StopRequest) -> str:
    """Compare every tensor with its checksum; the first that differs, or empty."""
    checksums = json.loads(header.metadata.get(CHECKSUMS_KEY, "{}"))
    with header.path.open("rb") as file:
        for name, entry in header.tensors.items():
            if hash_range(file.fileno(), entry.begin, entry.end, stop) != checksums.get(name):
                return f"{header.path}: tensor {name} does not match its checksum"
    return ""


def _record(header: Header, stop: StopRequest) -> LayerRecord:
    with header.path.open("rb") as file:
        sha256 = hash_range(file.fileno(), 0, header.file_size, stop)
    return LayerRecord(header.path.name, header.file_size, sha256)
