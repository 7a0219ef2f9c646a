"""Checks of the experts' threads against the CPUs that this process may use."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.checks.result import Finding, Status, warn_unless
from deploy.checks.situation import Situation, check
from deploy.launch.by_card import gpus_used
from kt_kernel.files.units import ranges
from kt_kernel.host.cpus import allowed_cpus, cpus_beside_experts, online_cpus
from kt_kernel.host.reservations import folder, holders


@check("threads")
def check_threads(situation: Situation) -> Iterator[Finding]:
    """Threads of the experts against what this process may use.

    More threads than CPUs is a FAIL and not a warning: every layer waits for its slowest thread,
    so one shared CPU halves the speed of the whole server and nothing else would show it.
    """
    machine = situation.machine
    threads: int = situation.values["KT_CPUINFER"]
    cpus = f"{machine.cores} cores with {machine.cpus} CPUs in this process's CPU set"
    gpus = gpus_used(situation.values)
    auto = machine.expert_threads(gpus)
    expected = f"KT_CPUINFER of at most {machine.cores}"
    if threads > machine.cpus:
        yield Finding(
            Status.FAIL,
            expected,
            f"{threads} threads for {cpus}",
            f"set KT_CPUINFER={auto} or auto",
        )
    elif machine.cpu_quota is not None and threads > machine.cpu_quota:
        yield Finding(
            Status.FAIL,
            f"KT_CPUINFER of at most {machine.cpu_quota:g}",
            f"{threads} threads for a control group's quota of {machine.cpu_quota:g} CPUs",
            f"raise the quota or set KT_CPUINFER={auto}",
        )
    elif threads > machine.cores:
        yield Finding(
            Status.WARN,
            expected,
            f"{threads} threads for {cpus}",
            f"two threads of a core share its units: set KT_CPUINFER={auto} or auto",
        )
    elif gpus and threads > auto:
        yield Finding(
            Status.WARN,
            f"KT_CPUINFER of at most {auto}, which leaves {cpus_beside_experts(gpus)} CPUs to "
            "SGLang's schedulers and the thread that starts CUDA graphs' calls",
            f"{threads} threads for {machine.usable_cpus} CPUs",
            f"each layer would wait for time slices: set KT_CPUINFER={auto} or auto",
        )
    else:
        yield Finding(Status.PASS, expected, f"{threads} threads for {cpus}")


@check("cpu-reservations")
def check_cpu_reservations(situation: Situation) -> Iterator[Finding]:
    """No other server of this host computes on the CPUs that the experts' threads would take."""
    held = holders(folder(), situation.root)
    usable = {cpu.id for cpu in allowed_cpus(situation.root)}
    by_process: dict[int, list[int]] = {}
    for cpu in usable & held.keys():
        by_process.setdefault(held[cpu], []).append(cpu)
    threads = situation.values["KT_CPUINFER"]
    free = len(usable) - sum(map(len, by_process.values()))
    told = ", ".join(
        f"{ranges(cpus)} are process {process or 'of another container'}'s"
        for process, cpus in sorted(by_process.items())
    )
    own = f"set KT_CPUINFER={free}, less" if free else "set a lower KT_CPUINFER"
    yield warn_unless(
        threads <= free or not by_process,
        # What is more than there are, the check of the threads refuses.
        f"{min(threads, len(usable))} of {len(usable)} CPUs that no other server of this host "
        "computes on",
        f"{free}; {told}" if told else f"{free}",
        f"all of them would wait for each other: {own} on the other server, or KT_CPUS on both",
    )


@check("thread-pools")
def check_thread_pools(situation: Situation) -> Iterator[Finding]:
    """A pool of threads for each NUMA node."""
    threads: int = situation.values["KT_CPUINFER"]
    pools: int = situation.values["KT_THREADPOOL_COUNT"]
    if pools > threads:
        yield Finding(
            Status.FAIL,
            f"KT_THREADPOOL_COUNT of at most KT_CPUINFER={threads}",
            f"{pools}",
            "a pool needs a thread: lower KT_THREADPOOL_COUNT",
        )
    else:
        best = min(situation.machine.numa_nodes, threads)
        fits = pools == best
        yield warn_unless(
            fits,
            f"one pool per NUMA node, that is KT_THREADPOOL_COUNT={best}",
            f"{pools}",
            "set it to that or to auto",
        )


@check("cpu-limits")
def check_cpu_limits(situation: Situation) -> Iterator[Finding]:
    """Neither a CPU set nor a quota keeps this process from most of the machine."""
    machine = situation.machine
    total = online_cpus(situation.root) or machine.cpus
    granted = machine.cpus if machine.cpu_quota is None else min(machine.cpus, machine.cpu_quota)
    good = granted >= total or situation.is_small
    quota = f", a quota of {machine.cpu_quota:g}" if machine.cpu_quota is not None else ""
    yield warn_unless(
        good,
        f"the use of all {total} CPUs",
        f"a CPU set of {machine.cpus}{quota}",
        "raise the container's or the control group's limits unless this is meant",
    )
