"""The worker threads that all layers of a process share."""

from __future__ import annotations

import functools
import logging
import os

from kt_kernel import _ext
from kt_kernel.errors import UserError

logger = logging.getLogger(__name__)


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
    one: more threads than CPUs would make each phase wait for the slowest time slice. Layers are
    cut into ``pools`` slices, also where there are fewer threads than that.

    Raises:
        UserError: a count below 1, or a bad ``KT_TARGET``.
    """
    return _engine(threads, pools, target_name())


@functools.cache
def _engine(threads: int, pools: int, target: str) -> _ext.Engine:
    for name, value in (("cpuinfer_threads", threads), ("threadpool_count", pools)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected at least 1")
    groups = _ext.choose_cpus(_ext.allowed_cpus(), threads, pools)
    found = sum(len(group) for group in groups)
    if found < threads:
        logger.warning(
            "kt_kernel: --kt-cpuinfer asks for %d threads, %d CPUs may be used: running %d",
            threads,
            found,
            found,
        )
    logger.info("kt_kernel: target %s, %d threads on CPUs %s", target, found, groups)
    return _ext.Engine(groups, pools, target)
