"""Checks of the CPU: what its units can run and how much of it this process may use."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.checks import Result, Situation, Status
from deploy.limits import online_cpus
from deploy.setting import AUTO

#: Targets without AVX-512, and what they cost.
SLOW_TARGETS = ("avx2", "scalar", "reference")


def kernel_facts() -> tuple[list[tuple[str, bool]], dict[str, bool], str]:
    """The kernel's targets in order of preference and whether the CPU runs them; the CPU's
    features, among them ``amx_permitted``, which the operating system was asked for; its name."""
    from kt_kernel import _ext

    return _ext.targets(), dict(_ext.cpu_features()), _ext.cpu_brand()


def check_instruction_set(situation: Situation) -> Iterator[Result]:
    """The kernel's target: the one that KT_TARGET forces, or the best that this CPU runs."""
    try:
        targets, features, brand = kernel_facts()
    except ImportError:
        return  # the check of the packages reports that
    wanted = situation.values["KT_TARGET"]
    supported = [name for name, runs in targets if runs]
    have = " ".join(name for name, present in features.items() if present) or "no vector units"
    if wanted not in (None, AUTO) and wanted not in supported:
        yield Result(
            "instruction-set",
            Status.FAIL,
            f"a CPU that runs KT_TARGET={wanted}",
            f"{brand} with {have}",
            f"set KT_TARGET to auto or one of {', '.join(supported)}",
        )
        return
    target = supported[0] if wanted in (None, AUTO) else wanted
    slow = target in SLOW_TARGETS and not situation.is_small
    yield Result(
        "instruction-set",
        Status.WARN if slow else Status.PASS,
        "AVX-512 with VNNI or better for the experts",
        f"target {target} on {brand} with {have}",
        ("set KT_TARGET=auto" if target != supported[0] else "expect a fraction of the speed")
        if slow
        else "",
    )


def check_amx(situation: Situation) -> Iterator[Result]:
    """A CPU with AMX may use it: the operating system hands out the tiles on request only."""
    try:
        _, features, _ = kernel_facts()
    except ImportError:
        return
    expected = "permission to use AMX, if the CPU has it"
    if not features.get("amx_tile"):
        yield Result("amx", Status.PASS, expected, "a CPU without AMX")
    elif features.get("amx_permitted"):
        yield Result("amx", Status.PASS, expected, "that the operating system grants it")
    else:
        yield Result(
            "amx",
            Status.WARN,
            expected,
            "that the operating system refuses it (arch_prctl)",
            "use Linux 5.16 or later; in a virtual machine or container, let it use AMX",
        )


def check_cpu_limits(situation: Situation) -> Iterator[Result]:
    """Neither a CPU set nor a quota keeps this process from most of the machine."""
    machine = situation.machine
    total = online_cpus(situation.root) or machine.cpus
    granted = machine.cpus if machine.cpu_quota is None else min(machine.cpus, machine.cpu_quota)
    limited = granted < total
    quota = f", a quota of {machine.cpu_quota:g}" if machine.cpu_quota is not None else ""
    yield Result(
        "cpu-limits",
        Status.WARN if limited and not situation.is_small else Status.PASS,
        f"the use of all {total} CPUs",
        f"a CPU set of {machine.cpus}{quota}",
        "raise the container's or the control group's limits unless this is meant"
        if limited and not situation.is_small
        else "",
    )
