"""Checks of the CPU: what its units can run."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.checks.result import Finding, Status, warn_unless
from deploy.checks.situation import Situation, check
from deploy.settings.row import AUTO

#: Targets without AVX-512, and what they cost.
SLOW_TARGETS = ("avx2", "scalar", "reference")


def kernel_facts() -> tuple[list[tuple[str, bool]], dict[str, bool], str]:
    """The kernel's targets in order of preference and whether the CPU runs them; the CPU's
    features, among them ``amx_permitted``, which the operating system was asked for; its name."""
    from kt_kernel import _ext

    return _ext.targets(), dict(_ext.cpu_features()), _ext.cpu_brand()


@check("instruction-set")
def check_instruction_set(situation: Situation) -> Iterator[Finding]:
    """The kernel's target: the one that KT_TARGET forces, or the best that this CPU runs."""
    try:
        targets, features, brand = kernel_facts()
    except ImportError:
        return  # the check of the packages reports that
    wanted = situation.values["KT_TARGET"]
    supported = [name for name, runs in targets if runs]
    have = " ".join(name for name, present in features.items() if present) or "no vector units"
    if wanted not in (None, AUTO) and wanted not in supported:
        yield Finding(
            Status.FAIL,
            f"a CPU that runs KT_TARGET={wanted}",
            f"{brand} with {have}",
            f"set KT_TARGET to auto or one of {', '.join(supported)}",
        )
        return
    target = supported[0] if wanted in (None, AUTO) else wanted
    fast = target not in SLOW_TARGETS or situation.is_small
    yield warn_unless(
        fast,
        "AVX-512 with VNNI or better for the experts",
        f"target {target} on {brand} with {have}",
        "set KT_TARGET=auto" if target != supported[0] else "expect a fraction of the speed",
    )


@check("amx")
def check_amx(situation: Situation) -> Iterator[Finding]:
    """A CPU with AMX may use it: the operating system hands out the tiles on request only."""
    try:
        _, features, _ = kernel_facts()
    except ImportError:
        return
    expected = "permission to use AMX, if the CPU has it"
    if not features.get("amx_tile"):
        yield Finding(Status.PASS, expected, "a CPU without AMX")
    elif features.get("amx_permitted"):
        yield Finding(Status.PASS, expected, "that the operating system grants it")
    else:
        yield Finding(
            Status.WARN,
            expected,
            "that the operating system refuses it (arch_prctl)",
            "use Linux 5.16 or later; in a virtual machine or container, let it use AMX",
        )
