"""The stage ``check``: a report of every check, for people or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from deploy.argv import resolve
from deploy.by_card import memory_line
from deploy.checks import Situation, Status, all_checks, run_checks
from deploy.config import Config, export
from deploy.machine import survey


def run(config: Config, as_json: bool, host_only: bool) -> int:
    """Print the report; ``host_only`` leaves out what needs a model and its weights.

    Returns:
        0 if no check failed, 1 otherwise.
    """
    export(config)
    machine = survey()
    values, notes = resolve(config, machine)
    memory = memory_line(values, machine)
    entries = [entry for entry in all_checks() if entry.host or not host_only]
    results = run_checks(Situation(values, config.environment, machine), entries)
    failed = sum(result.status is Status.FAIL for result in results)
    if as_json:
        print(
            json.dumps(
                {
                    "ok": failed == 0,
                    "chosen": list(notes),
                    "gpu_memory": memory,
                    "checks": [asdict(result) for result in results],
                },
                indent=1,
            )
        )
    else:
        for note in (*notes, *([memory] if memory else [])):
            print(note)
        for result in results:
            print(f"{result.status}: {result.sentence()}")
        warned = sum(result.status is Status.WARN for result in results)
        print(f"{len(results)} checks, {failed} failed, {warned} warnings")
    return 1 if failed else 0
