"""The worker threads that all layers of a process share."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed

from kt_kernel import _ext
from kt_kernel.arguments import whole
from kt_kernel.errors import UserError
from kt_kernel.files.units import ranges
from kt_kernel.host.cpus import (
    allowed_cpus,
    count_cores,
    cpus_beside_experts,
    within_quota,
)
from kt_kernel.host.limits import read_cpu_quota
from kt_kernel.host.memory import huge_page_mode
from kt_kernel.host.reservations import Reservations, folder

logger = logging.getLogger(__name__)

#: NUMA nodes that Linux knows, which is what the extension takes.
MAX_POOLS = 1024

#: Environment variable that names a file for the engine's totals, renewed while calls end.
#: ``benchmarks.rehearsal`` sets it and reads the file; no setting for users.
TOTALS_VARIABLE = "_KT_ENGINE_TOTALS_FILE"
_PUBLISH_SECONDS = 0.1


def _gpus() -> int:
    """GPUs that serve the model with this process, which is the one with the CPU experts."""
    if not torch.cuda.is_initialized():
        return 0
    return distributed.get_world_size() if distributed.is_initialized() else 1


def target_name() -> str:
    """Name of the target that runs: ``KT_TARGET``, or the best one for this CPU.

    Raises:
        UserError: ``KT_TARGET`` names a target that is unknown or that this CPU cannot run.
    """
    try:
        return _ext.resolve_target(os.environ.get("KT_TARGET", ""))
    except ValueError as error:
        raise UserError(f"KT_TARGET: {error}") from None


def shared_engine(threads: int, pools: int) -> _ext.Engine:
    """The engine of that many threads in ``pools`` groups, one group for each NUMA node.

    Threads are pinned to the CPUs that this process may use, physical cores first, and never share
    one: more threads than CPUs, or than a control group's quota pays for, would make each phase
    wait for the slowest time slice. There are fewer threads then, and a warning says so. Layers are
    cut into ``pools`` slices, also where there are fewer threads than that.

    Raises:
        UserError: a count below 1 or that no machine has, or a bad ``KT_TARGET``.
    """
    return _engine(
        whole("cpuinfer_threads", threads, 1),
        whole("threadpool_count", whole("threadpool_count", pools, 1), 1, MAX_POOLS),
        target_name(),
        os.getpid(),  # a forked process has none of its parent's workers
    )


@functools.cache
def _reservations() -> Reservations:
    return Reservations(folder())


@functools.cache
def _engine(threads: int, pools: int, target: str, _process: int) -> _ext.Engine:
    cpus, quota = allowed_cpus(), read_cpu_quota()
    granted = within_quota(len(cpus), quota)
    groups, shared = _reservations().choose(cpus, min(threads, granted), pools)
    running = sum(len(group) for group in groups)
    cores = count_cores(cpus)
    if running < threads:
        limit = "" if granted == len(cpus) else f" with a control group's quota of {quota:g}"
        logger.warning(
            "kt_kernel: --kt-cpuinfer asks for %d threads; this process may use %d CPUs%s: running "
            "%d",
            threads,
            len(cpus),
            limit,
            running,
        )
    if running > cores:
        logger.warning(
            "kt_kernel: %d threads on %d physical cores: two threads of a core share its units; "
            "%d threads would be as fast",
            running,
            cores,
            cores,
        )
    if shared:
        logger.warning(
            "kt_kernel: other servers of this host compute on CPUs %s, too, and all wait for "
            "time slices: --kt-cpuinfer %d is faster, or KT_CPUS for each server",
            ranges(shared),
            max(1, running - len(shared)),
        )
    # Without CUDA nothing else runs while the experts do.
    beside = cpus_beside_experts(_gpus())
    if granted - running < beside:
        logger.warning(
            "kt_kernel: %d threads on %d CPUs leave too few to SGLang's schedulers and CUDA's host "
            "functions, and each layer waits for time slices of milliseconds: --kt-cpuinfer %d is "
            "faster",
            running,
            granted,
            max(1, granted - beside),
        )
    if huge_page_mode() == "never":
        logger.warning(
            "kt_kernel: transparent huge pages are off, which costs an address lookup every few "
            "rows of weights: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    logger.info("kt_kernel: target %s, %d threads on CPUs %s", target, running, groups)
    made = _ext.Engine(groups, pools, target)
    if path := os.environ.get(TOTALS_VARIABLE):
        threading.Thread(target=_keep_publishing, args=(made, Path(path)), daemon=True).start()
    return made


def publish_totals(engine: _ext.Engine, path: Path) -> None:
    """Write the engine's totals as JSON, whole or not at all; best effort."""
    partial = path.with_name(path.name + ".partial")
    with suppress(OSError):
        partial.write_text(json.dumps(engine.totals))
        partial.replace(path)


def _keep_publishing(engine: _ext.Engine, path: Path) -> None:
    calls = -1
    while True:
        if (now := engine.totals["calls"]) != calls:
            publish_totals(engine, path)
            calls = now
        time.sleep(_PUBLISH_SECONDS)
