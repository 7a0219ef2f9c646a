"""The CPUs that this process may use: how they lie on cores and NUMA nodes, which to take."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kt_kernel.errors import UserError

CPUS_VARIABLE = "KT_CPUS"
#: Ids in a list are below it: Linux is built for at most 8192 CPUs, and a list is held in memory.
CPU_LIMIT = 1 << 16


class Cpu(NamedTuple):
    """A logical CPU.

    Attributes:
        core_rank: 0 for the first hyperthread of its core, 1 for the second, ...; only those count
            that this process may use.
    """

    id: int
    node: int
    core_rank: int


def parse_cpu_list(text: str) -> set[int]:
    """The CPUs of a kernel list such as ``0-3,8``.

    Raises:
        ValueError: the text is not a list of that form, or an id is not below :data:`CPU_LIMIT`.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < CPU_LIMIT:
            raise ValueError(f"{part}: expected ids below {CPU_LIMIT}, the smaller one first")
        cpus.update(range(low, high + 1))
    return cpus


def online_cpus(root: Path = Path("/")) -> int:
    """CPUs of the machine, whether this process may use them or not; 0 if unknown."""
    try:
        return len(parse_cpu_list((root / "sys/devices/system/cpu/online").read_text()))
    except (OSError, ValueError):
        return 0


def usable_cpus() -> set[int]:
    """The CPUs of this process's affinity mask (cpuset, taskset) that ``KT_CPUS`` names.

    Raises:
        UserError: it names none of them.
    """
    usable = os.sched_getaffinity(0)
    named = os.environ.get(CPUS_VARIABLE)
    if not named:
        return usable
    try:
        chosen = parse_cpu_list(named) & usable
    except ValueError:
        chosen = set()
    if not chosen:
        raise UserError(
            f"{CPUS_VARIABLE}: expected CPUs that this process may use, as in 0-3,8, found {named}"
        )
    return chosen


def allowed_cpus(root: Path = Path("/")) -> list[Cpu]:
    """The CPUs of :func:`usable_cpus`, by id."""
    allowed = sorted(usable_cpus())
    node_of = {cpu: node for node, cpus in cpus_of_nodes(root).items() for cpu in cpus}
    seen: Counter[int] = Counter()
    found = []
    for cpu in allowed:
        core = _core(cpu, root)
        found.append(Cpu(cpu, node_of.get(cpu, 0), seen[core]))
        seen[core] += 1
    return found


def _core(cpu: int, root: Path) -> int:
    """The first CPU of the same physical core; the CPU itself if the kernel is silent."""
    siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return min(parse_cpu_list(siblings.read_text()))
    except (OSError, ValueError):
        return cpu


def cpus_of_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """The usable CPUs of each NUMA node that has any; all of them on node 0 if unknown."""
    usable = usable_cpus()
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        try:
            cpus = parse_cpu_list((folder / "cpulist").read_text()) & usable
        except (OSError, ValueError):
            return {0: usable}
        if cpus:
            nodes[int(folder.name.removeprefix("node"))] = cpus
    return dict(sorted(nodes.items())) or {0: usable}


def count_cores(cpus: Iterable[Cpu]) -> int:
    """Physical cores behind some logical CPUs."""
    return sum(cpu.core_rank == 0 for cpu in cpus)


def cores_first(cpus: Iterable[Cpu]) -> list[Cpu]:
    """One CPU of each physical core before any second hyperthread; by id otherwise."""
    return sorted(cpus, key=lambda cpu: cpu.core_rank)


def choose_cpus(cpus: Sequence[Cpu], threads: int, pools: int) -> list[list[int]]:
    """``threads`` of the CPUs in ``pools`` groups, as ids; ``cpus`` as from :func:`allowed_cpus`.

    Group g takes the g-th NUMA node (modulo the nodes there are), physical cores before
    hyperthreads. There are fewer CPUs where there are not as many, and fewer groups where there are
    fewer CPUs than groups: workers never share a CPU.

    Raises:
        ValueError: a count below 1.
    """
    if threads < 1:
        raise ValueError(f"thread count is {threads}: expected at least 1")
    if pools < 1:
        raise ValueError(f"threadpool count is {pools}: expected at least 1")
    free = cores_first(cpus)
    threads = min(threads, len(free))
    pools = min(pools, threads)
    nodes = sorted({cpu.node for cpu in free})
    chosen: list[list[int]] = [[] for _ in range(pools)]
    for pool, group in enumerate(chosen):
        node = nodes[pool % len(nodes)]
        share = threads // pools + (pool < threads % pools)
        for cpu in [cpu for cpu in free if cpu.node == node][:share]:
            group.append(cpu.id)
            free.remove(cpu)
    # Where a node has too few, CPUs of others help the smallest group: all have the same work.
    for _ in range(threads - sum(map(len, chosen))):
        min(chosen, key=len).append(free.pop(0).id)
    return chosen


def cpus_beside_experts(gpus: int) -> int:
    """CPUs that a server on so many GPUs needs besides the experts' threads; 0 for none.

    SGLang's scheduler of each GPU, and on the first the thread that watches CUDA graphs
    (csrc/stream/flags.h), else CUDA's for host functions, poll all the time. A pinned worker that
    shares its CPU with one of them keeps each layer waiting for a time slice,
    which is milliseconds (docs/performance.md).
    """
    return gpus + 1 if gpus else 0


def within_quota(
    cpus: int, quota: float | None, rounded: Callable[[float], int] = math.floor
) -> int:
    """Threads that so many CPUs run at the same time within a control group's quota; at least 1.

    Rounded down: threads that wait for each other would all wait for a time slice. Those that work
    on their own can use the rest of the quota, too: ``math.ceil``.
    """
    return cpus if quota is None else max(1, min(cpus, rounded(quota)))
