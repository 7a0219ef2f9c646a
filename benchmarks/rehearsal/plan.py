"""How many layers this machine can rehearse, and where their files go."""

from __future__ import annotations

import itertools
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
        counts: MoE layers of each server that the line goes through, ascending.
        folder: where the checkpoint's files go.
        packed: where the packed layers' files go.
        check: MoE layers of a server that the line is compared with; None for none.
    """

    counts: tuple[int, ...]
    folder: Path
    packed: Path
    check: int | None = None

    @property
    def most(self) -> int:
        """MoE layers of the largest server."""
        return max(*self.counts, self.check or 0)


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        method: format of the packed experts.
        resident: experts of each layer on the GPU.
        values: the settings.
        one_file: a packed file stands for all layers.
    """

    method: str
    resident: int
    values: Mapping[str, Any]
    one_file: bool = True


def v32_layout(method: str) -> PackedLayout:
    """The packed layout of one of V3.2's MoE layers."""
    config = V32_CONFIG
    return PackedLayout(
        config["n_routed_experts"], config["hidden_size"], config["moe_intermediate_size"], method
    )


@dataclass(frozen=True)
class Demand:
    """Bytes that a number of MoE layers takes: packed files, the checkpoint's, memory, GPU."""

    packed: float
    checkpoint: float
    memory: float
    card: float


def demand(count: int, model: Model, card: Gpu | None) -> Demand:
    """What a server of the first ``count`` MoE layers takes."""
    sizes = GpuSizes(config_of(count), multiprocessors=card.multiprocessors if card else 0)
    layer = layer_bytes(v32_layout(model.method))
    on_card = sizes.weights() + sizes.experts(model.resident)
    memory = count * layer + SERVER_BYTES
    if card is None:  # FP8 becomes bf16, and nothing is on a card
        memory += 2 * on_card
    chosen = {**model.values, "KT_NUM_GPU_EXPERTS": model.resident}
    taken = sizes.memory(chosen, card.free_bytes).total if card else 0.0
    return Demand(layer * (1 if model.one_file else count), on_card, memory, taken)


def choose(wanted: str, machine: Machine, model: Model, check: int | None = None) -> Plan:
    """The plan for ``--layers``: ``auto``, a largest number, or the numbers themselves.

    Args:
        wanted: that text.
        machine: what there is.
        model: what is served.
        check: MoE layers of one more server, through which the line does not go.

    Raises:
        BenchmarkError: not such a text or number, or the machine cannot hold what it asks for.
    """
    counts = _parse(wanted)
    if check is not None and not 1 <= check <= MOE_LAYERS:
        raise BenchmarkError(
            f"--check {check}: expected a number of MoE layers from 1 to {MOE_LAYERS}"
        )
    if counts is None:
        most = MOST if machine.card else MOST_ON_CPU
        while most > 1 and _folders(most, machine, model)[0] is None:
            most -= 1
        counts = spread_over(most)
    elif len(counts) == 1:
        counts = spread_over(counts[0])
    if check is not None:
        counts = tuple(count for count in counts if count != check)
        if len(counts) < 2:
            raise BenchmarkError(
                f"--check {check}: expected at least two other numbers of MoE layers for the line, "
                f"found {' and '.join(map(str, counts)) or 'none'} (--layers 1,4)"
            )
    most = max(*counts, check or 0)
    folders, why = _folders(most, machine, model)
    if folders is None:
        raise BenchmarkError(f"{most} MoE layers do not fit: {why}")
    packed, folder = folders
    return Plan(counts, folder, packed, check)


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


def _folders(count: int, machine: Machine, model: Model) -> tuple[tuple[Path, Path] | None, str]:
    """The first folders for packed layers and checkpoint with which ``count`` layers fit.

    None and why, if there are none. Packed layers are read once for each layer and have the faster
    folder first.
    """
    need = demand(count, model, machine.card)
    if machine.card and need.card > machine.card.free_bytes:
        return None, _short("GPU memory", need.card, machine.card.free_bytes)
    if not machine.disks:
        return None, "no folder for their files can be written: expected one, set --folder"
    why = []
    for packed, checkpoint in itertools.combinations_with_replacement(machine.disks, 2):
        files = dict.fromkeys((packed, checkpoint), 0.0)
        files[packed] += need.packed
        files[checkpoint] += need.checkpoint
        memory = need.memory + files.get(TMPFS, 0.0)
        where = " and ".join(map(str, files))
        full = {f: size for f, size in files.items() if size > machine.disks[f] * (1 - SPARED)}
        if memory > machine.memory * (1 - SPARED):
            why.append(_short(f"memory with files in {where}", memory, machine.memory))
        elif full:
            why += [_short(f"space in {f}", size, machine.disks[f]) for f, size in full.items()]
        else:
            return (packed, checkpoint), ""
    return None, "; ".join(dict.fromkeys(why))


def _short(what: str, needed: float, found: float) -> str:
    return f"expected {gigabytes(needed)} of {what} and some to spare, found {gigabytes(found)}"
