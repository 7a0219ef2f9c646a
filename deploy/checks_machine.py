"""Checks of memory and disks against what the model needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deploy.checks import Result, Situation, Status
from deploy.progress import gigabytes

#: V3.2 in bytes, for when it is not there yet to be measured: 654e9 expert weights of 4.13 bits,
#: and the checkpoint on the Hub.
V32_INT4_BYTES = 338e9
V32_MODEL_BYTES = 689e9


def check_memory(situation: Situation) -> Iterator[Result]:
    """The experts fit into memory: what does not is read from the disk again for every token."""
    weights = sum(file.stat().st_size for file in situation.weight_path.glob("*.safetensors"))
    known = weights > 0
    needed = weights if known else V32_INT4_BYTES
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    expected = f"at least {gigabytes(needed)} of memory for the experts"
    if not known:
        expected += " of V3.2 at 4 bits"
    enough = total >= needed
    yield Result(
        "memory",
        Status.PASS if enough else Status.FAIL if known else Status.WARN,
        expected,
        gigabytes(total),
        "" if enough else "add memory or serve a smaller model",
    )


def check_disk(situation: Situation) -> Iterator[Result]:
    """Room for what is still to be downloaded and converted."""
    for name, path, needed in (
        ("KT_MODEL_PATH", situation.model_path, V32_MODEL_BYTES),
        ("KT_WEIGHT_PATH", situation.weight_path, V32_INT4_BYTES),
    ):
        if path.is_dir() and any(path.glob("*.safetensors")):
            continue  # there already; whether it is complete is another check
        free = shutil.disk_usage(_nearest_existing(path)).free
        enough = free >= needed
        yield Result(
            "disk",
            Status.PASS if enough else Status.WARN,
            f"{gigabytes(needed)} free for V3.2 in {name} {path}",
            f"{gigabytes(free)} free",
            "" if enough else "free some or choose another disk",
        )


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
