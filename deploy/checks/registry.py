"""All checks, in the order of the report.

``serve`` runs those marked for it and refuses to start on a FAIL; ``check`` runs them all. A check
is a function in one of the modules below, under ``@check``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from deploy.checks import (
    access,
    compose,
    cpu,
    exposure,
    gpu,
    installation,
    machine,
    model,
    port,
    threads,
    weight_cache,
)
from deploy.checks.result import Result, Status
from deploy.checks.situation import Check, Situation

CHECKS = tuple(
    found
    for module in (
        installation,
        cpu,
        gpu,
        threads,
        machine,
        access,
        model,
        weight_cache,
        port,
        exposure,
        compose,
    )
    for found in vars(module).values()
    if isinstance(found, Check)
)


def run_checks(situation: Situation, checks: Iterable[Check]) -> list[Result]:
    """Run the checks in order; a FAIL that the settings tell to ignore becomes a WARN."""
    ignored = situation.values["KT_IGNORE_CHECKS"] or ()
    results = [result for check in checks for result in check(situation)]
    return [
        replace(result, status=Status.WARN, todo=f"{result.todo} (KT_IGNORE_CHECKS ignores it)")
        if result.status is Status.FAIL and result.check in ignored
        else result
        for result in results
    ]
