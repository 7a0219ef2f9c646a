"""The file of counts, which outlives the server and adds up over its starts.

Whoever saves adds to what is there, under a lock, and replaces the file as a whole: servers that
share one do not undo each other's counts, and a kill at any moment leaves the old file or the new.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kt_kernel.errors import UserError
from kt_kernel.files.durable import CREATE, named_write_errors, replace_file
from kt_kernel.files.foreign import FileMissing, read_fields
from kt_kernel.files.locks import CannotLock, lock
from kt_kernel.packed import MAX_EXPERTS
from kt_kernel.placement.counts import Counts, Model

FORMAT_NAME = "kt-kernel-expert-counts"
FORMAT_VERSION = 1
_LAYER = re.compile(r"0|[1-9][0-9]{0,8}")
_MOST = 2**53  # of a count: what every JSON reader takes for an integer
_ADVICE = "remove it or set KT_EXPERT_COUNTS to another file"


def read_counts(path: Path, model: Model) -> dict[int, NDArray[np.int64]]:
    """The counts in a file.

    Raises:
        FileMissing: there is none.
        UserError: it cannot be read, is damaged, no such file, or of another model.
    """
    counted, counts = _read(path)
    if counted != model:
        raise UserError(
            f"{path} has the counts of another model ({counted.num_experts} experts, checkpoint "
            f"{counted.fingerprint[:12] or 'unknown'}; expected {model.num_experts}, "
            f"{model.fingerprint[:12] or 'unknown'}): {_ADVICE}"
        )
    return counts


def read_any_counts(path: Path) -> dict[int, NDArray[np.int64]]:
    """The same, of whatever model."""
    return _read(path)[1]


def _read(path: Path) -> tuple[Model, dict[int, NDArray[np.int64]]]:
    found = read_fields(path, advice=_ADVICE)
    form = (found.values.get("format"), found.values.get("format_version"))
    if form != (FORMAT_NAME, FORMAT_VERSION):
        raise UserError(f"{path} holds no expert counts of this version: {_ADVICE}")
    model = Model(found.text("fingerprint"), found.integer("num_experts", 1, MAX_EXPERTS))
    layers = found.inner("layers")
    counts = {}
    for name in layers.values:
        values = layers.integers(name, maximum=_MOST)
        if not _LAYER.fullmatch(name) or len(values) != model.num_experts:
            raise UserError(f"{path} is damaged, as layer {name[:20]!r} shows: {_ADVICE}")
        counts[int(name)] = np.array(values, np.int64)
    return model, counts


def add_counts(path: Path, model: Model, new: Counts) -> None:
    """Add counts to those in the file, which is made if there is none.

    Raises:
        UserError: it cannot be read or written, is damaged or of another model; it stays as it is.
    """
    with named_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path):
            try:
                counts = read_counts(path, model)
            except FileMissing:
                counts = {}
            for layer, more in new.items():
                counts[layer] = np.minimum(counts.get(layer, 0) + more, _MOST)
            replace_file(path, _content(model, counts))


def _content(model: Model, counts: Counts) -> bytes:
    layers = {str(layer): counts[layer].tolist() for layer in sorted(counts)}
    whole = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(model)}
    return json.dumps({**whole, "layers": layers}).encode() + b"\n"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside a file, which the kernel releases with the process."""
    fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | CREATE, 0o644)
    try:
        with suppress(CannotLock):  # only counts could be lost
            lock(fd, path.parent)
        yield
    finally:
        os.close(fd)
