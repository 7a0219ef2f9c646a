"""Packed experts in memory that the card cannot read by itself: what CUDA registers, and the rest.

CUDA refuses to register memory where the system allows little of it to be pinned, as WSL does. The
driver would copy such memory through a buffer of its own, slowly and with the calling thread
waiting. So threads of this process fill pinned staging buffers, beside the experts' workers.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel import _ext
from kt_kernel.calls import current_stream
from kt_kernel.files.units import gigabytes
from kt_kernel.gpu_prefill.memory import STAGING_BUFFER_BYTES, STAGING_BUFFERS, STAGING_THREADS
from kt_kernel.host.cpus import cpus_of_nodes

#: For measurements and tests: nothing is registered.
STAGING_VARIABLE = "_KT_GPU_PREFILL_STAGING"

#: What CUDA refused to unregister, and what was to follow: never freed, as ``Registered`` says why.
_still_registered: list[list[NDArray[np.uint8]]] = []

#: Of CUDA, for memory; raises RuntimeError where CUDA refuses.
OfMemory = Callable[[NDArray[np.uint8]], None]


class HostRegister(NamedTuple):
    """Registers memory, and ends that."""

    register: OfMemory
    unregister: OfMemory


class Registered:
    """Memory that CUDA has registered. It stays there as long as this object does.

    CUDA does not notice when registered memory is freed: it would take what is mapped there next
    for registered, and the card would read the old pages. So the memory is unregistered when this
    object goes, and held until then. Not at the process's end: nothing reads it any more, and
    hundreds of GB would take their time. Nor in a process that was forked, which has no card.

    Args:
        unregister: of CUDA.
    """

    def __init__(self, unregister: OfMemory) -> None:
        self._memory: list[NDArray[np.uint8]] = []
        arguments = unregister, self._memory, os.getpid()
        self._release = weakref.finalize(self, _unregister, *arguments)
        self._release.atexit = False

    def add(self, memory: NDArray[np.uint8]) -> None:
        """Hold what has just been registered."""
        self._memory.append(memory)

    def release(self) -> None:
        """Unregister it now, since others may still hold this object; a second time, nothing.

        The card's copies from it must have ended. What CUDA refuses stays in memory from then on.

        Raises:
            RuntimeError: what CUDA refuses.
        """
        self._release()


def _unregister(unregister: OfMemory, memory: list[NDArray[np.uint8]], process: int) -> None:
    if os.getpid() == process:
        try:
            while memory:
                unregister(memory[-1])
                memory.pop()
        except BaseException:
            _still_registered.append(memory)
            raise


class StagedRows(NamedTuple):
    """Of a slice, the experts that go through staging buffers: bool [E]."""

    rows: NDArray[np.bool_]
    buffers: _ext.Staging

    def copy(self, row: torch.Tensor, target: torch.Tensor) -> None:
        """Put the copy of an expert's bytes on the target's current stream.

        Args:
            row: uint8 [bytes] in main memory, there until the copy is over.
            target: as many on the device.
        """
        self.buffers.copy(row.numpy(), target.data_ptr(), current_stream(target))


class StagingBuffers:
    """The staging buffers of each slice, made when the slice needs them first.

    Args:
        context: of the CUDA runtime; None for copies within this process.
        groups: CPU ids of each group of the experts' workers.
    """

    def __init__(self, context: _ext.StreamContext | None, groups: Sequence[Sequence[int]]) -> None:
        self._context, self._groups = context, groups
        self._made: dict[int, _ext.Staging | None] = {}
        #: Why there are none, if CUDA does not even pin those few bytes.
        self.refusal = ""

    def of(self, number: int) -> _ext.Staging | None:
        """Those of a slice; None where they cannot be had."""
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]

    def _make(self, number: int) -> _ext.Staging | None:
        cpus = copying_cpus(self._groups, number)
        sizes = STAGING_THREADS, STAGING_BUFFERS, STAGING_BUFFER_BYTES
        try:
            return _ext.Staging(self._context, cpus, *sizes)
        except RuntimeError as error:
            self.refusal = str(error)
            return None


def copying_cpus(groups: Sequence[Sequence[int]], number: int) -> list[int]:
    """CPUs of a slice's NUMA node on which no worker computes; all of the node's if there is none.

    Args:
        groups: CPU ids of each group of workers; a slice is the work of the group of its number
            modulo groups.
        number: of the slice.
    """
    group = groups[number % len(groups)]
    node = next((cpus for cpus in cpus_of_nodes().values() if group[0] in cpus), set(group))
    workers = {cpu for each in groups for cpu in each}
    return sorted(node - workers or node)


class Registration:
    """Has CUDA register the layers' memory, and remembers what came of it.

    After the first refusal nothing more is tried: what may be pinned besides is for the server's
    own buffers.

    Args:
        cuda: what registers it.
    """

    def __init__(self, cuda: HostRegister) -> None:
        self._cuda = cuda
        self.registered, self.staged, self.pageable = 0, 0, 0  # bytes, of all so far
        self.seconds = 0.0
        self.refusal = ""

    def add(
        self, slices: Sequence[torch.Tensor], held: NDArray[np.bool_], buffers: StagingBuffers
    ) -> tuple[Registered, dict[int, StagedRows]]:
        """Register a layer.

        Args:
            slices: uint8 [E, bytes of a slot] each.
            held: bool [E], experts whose weights are there: between them is address space without
                memory, which stays so.
            buffers: for what is refused. Where there are none, the driver copies it.

        Returns:
            What CUDA has registered, for as long as this is kept; and by slice, the rows that are
            to be staged.
        """
        registered = Registered(self._cuda.unregister)
        started = time.monotonic()
        experts = np.flatnonzero(held)
        runs = np.split(experts, np.flatnonzero(np.diff(experts) > 1) + 1)
        staged: dict[int, StagedRows] = {}
        for number, part in enumerate(slices):
            refused = np.zeros(len(held), np.bool_)
            for run in runs:
                rows = part[int(run[0]) : int(run[-1]) + 1]
                if self._registers(rows.numpy()):
                    registered.add(rows.numpy())
                    self.registered += rows.numel()
                else:
                    refused[run] = True
            size = int(refused.sum()) * part.shape[1]
            if not size:
                continue
            if (made := buffers.of(number)) is not None:
                staged[number] = StagedRows(refused, made)
                self.staged += size
            else:
                self.pageable += size
        self.seconds += time.monotonic() - started
        return registered, staged

    def _registers(self, rows: NDArray[np.uint8]) -> bool:
        if not self.refusal:
            try:
                self._cuda.register(rows)
            except RuntimeError as error:
                self.refusal = str(error) or "no reason given"
        return not self.refusal

    def summary(self, buffers: StagingBuffers) -> str:
        """How the experts of the layers so far go to the card, in a line."""
        if not self.refusal:
            return (
                f"{gigabytes(self.registered)} of experts registered with CUDA in "
                f"{self.seconds:.0f} s: the card reads them by itself"
            )
        text = (
            f"CUDA registered {gigabytes(self.registered)} of experts and refused the other "
            f"{gigabytes(self.staged + self.pageable)} ({self.refusal}), so prompts take longer: "
        )
        if self.staged:
            text += (
                f"{gigabytes(self.staged)} go to the card through staging buffers, filled by "
                f"{STAGING_THREADS} threads for each slice"
            )
        if self.pageable:
            text += "; " if self.staged else ""
            text += (
                f"{gigabytes(self.pageable)} by the driver's own buffer, which is slower still: "
                f"{buffers.refusal}"
            )
        return text


def registering(context: _ext.StreamContext | None) -> HostRegister:
    """What registers memory: CUDA, or nothing where there is no card and all can be read."""
    if os.environ.get(STAGING_VARIABLE):
        return HostRegister(_refuse, _need_not)
    if context is None:
        return HostRegister(_need_not, _need_not)
    return HostRegister(context.register_memory, context.unregister_memory)


def _refuse(_: NDArray[np.uint8]) -> None:
    raise RuntimeError(f"{STAGING_VARIABLE} is set")


def _need_not(_: NDArray[np.uint8]) -> None:
    pass
