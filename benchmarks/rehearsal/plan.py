"""How many layers this machine can rehearse, and where their files go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.rehearsal.packed_layers import layer_bytes
from benchmarks.rehearsal.sizes import MOE_LAYERS, config_of
from deploy.checks.needs import SERVER_BYTES
from deploy.launch.gpu_memory import V32_CONFIG, GpuSizes
from kt_kernel.files.units import gigabytes
from kt_kernel.host.gpus import Gpu
from kt_kernel.host.memory import Memory
from kt_kernel.packed import PackedLayout

TMPFS = Path("/dev/shm")
#: Of what is free, that much stays so.
SPARED = 0.08
#: More layers than that make the fit no better for the minutes that they take.
MOST, MOST_ON_CPU = 12, 2


@dataclass(frozen=True)
class Machine:
    """What there is for the rehearsal, in bytes.

    Attributes:
        memory: that programs could get now.
        disks: folder that may hold the files -> what is free there.
        card: the GPU, None without one.
    """

    memory: float
    disks: Mapping[Path, float]
    card: Gpu | None


def usable_memory(memory: Memory) -> float:
    """What programs could get now within the control group's limit."""
    return min(memory.available, memory.limit or memory.available)


def free_disks(folders: list[Path]) -> dict[Path, float]:
    """Those of the folders that can be written, with what is free there."""
    found = {}
    for folder in folders:
        if folder.is_dir() and os.access(folder, os.W_OK):
            found[folder] = float(shutil.disk_usage(folder).free)
    return found


@dataclass(frozen=True)
class Plan:
    """What is served one after the other.

    Attributes:
        counts: MoE layers of each server, ascending.
        folder: where the files go.
    """

    counts: tuple[int, ...]
    folder: Path


def v32_layout(method: str) -> PackedLayout:
    """The packed layout of one of V3.2's MoE layers."""
    config = V32_CONFIG
    return PackedLayout(
        config["n_routed_experts"], config["hidden_size"], config["moe_intermediate_size"], method
    )


@dataclass(frozen=True)
class Demand:
    """Bytes that ``count`` MoE layers take."""

    files: float
    memory: float
    card: float


def demand(
    count: int, method: str, resident: int, values: Mapping[str, Any], card: Gpu | None
) -> Demand:
    """What a server of the first ``count`` MoE layers takes; ``values`` are the settings."""
    sizes = GpuSizes(config_of(count), multiprocessors=card.multiprocessors if card else 0)
    packed = count * layer_bytes(v32_layout(method))
    on_card = sizes.weights() + sizes.experts(resident)
    memory = packed + SERVER_BYTES
    if card is None:  # FP8 becomes bf16, and nothing is on a card
        memory += 2 * on_card
    chosen = {**values, "KT_NUM_GPU_EXPERTS": resident}
    taken = sizes.memory(chosen, card.free_bytes).total if card else 0.0
    return Demand(packed + on_card, memory, taken)


def choose(
    wanted: str,
    machine: Machine,
    method: str,
    resident: int,
    values: Mapping[str, Any],
) -> Plan:
    """The plan for ``--layers``: ``auto``, a largest number, or the numbers themselves.

    Raises:
        BenchmarkError: not such a text, or the machine cannot hold what it asks for.
    """
    counts = _parse(wanted)
    if counts is None:
        most = MOST if machine.card else MOST_ON_CPU
        while most > 1 and _folder(most, machine, method, resident, values)[0] is None:
            most -= 1
        counts = spread_over(most)
    elif len(counts) == 1:
        counts = spread_over(counts[0])
    folder, why = _folder(counts[-1], machine, method, resident, values)
    if folder is None:
        raise BenchmarkError(f"{counts[-1]} MoE layers do not fit: {why}")
    return Plan(counts, folder)


def spread_over(most: int) -> tuple[int, ...]:
    """Three numbers of layers up to ``most``, fewer where there are no three."""
    return tuple(sorted({1, (most + 2) // 2, most})) if most > 2 else tuple(range(1, most + 1))


def _parse(wanted: str) -> tuple[int, ...] | None:
    if wanted == "auto":
        return None
    try:
        counts = tuple(sorted({int(word) for word in wanted.split(",")}))
    except ValueError:
        counts = ()
    if not counts or counts[0] < 1 or counts[-1] > MOE_LAYERS:
        raise BenchmarkError(
            f"--layers {wanted}: expected auto, a number of MoE layers from 1 to {MOE_LAYERS}, or "
            "several with commas between them"
        )
    return counts


def _folder(
    count: int,
    machine: Machine,
    method: str,
    resident: int,
    values: Mapping[str, Any],
) -> tuple[Path | None, str]:
    """The first folder with which ``count`` layers fit, or why there is none."""
    need = demand(count, method, resident, values, machine.card)
    if machine.card and need.card > machine.card.free_bytes:
        return None, _short("GPU memory", need.card, machine.card.free_bytes)
    if not machine.disks:
        return None, "no folder for their files can be written: expected one, set --folder"
    why = []
    for folder, free in machine.disks.items():
        memory = need.memory + (need.files if folder == TMPFS else 0.0)
        if memory > machine.memory * (1 - SPARED):
            why.append(_short(f"memory with files in {folder}", memory, machine.memory))
        elif need.files > free * (1 - SPARED):
            why.append(_short(f"space in {folder}", need.files, free))
        else:
            return folder, ""
    return None, "; ".join(why)


def _short(what: str, needed: float, found: float) -> str:
    return f"expected {gigabytes(needed)} of {what} and some to spare, found {gigabytes(found)}"
