"""The stage ``check``: a report of every check, for people or as JSON."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path

from deploy.checks.registry import CHECKS, run_checks
from deploy.checks.result import Status
from deploy.checks.situation import Situation
from deploy.launch.argv import resolve
from deploy.launch.by_card import memory_line
from deploy.settings.config import Config, export
from deploy.stages.stage import Stage
from deploy.state import DONE, StageState, read_state, run_directory
from kt_kernel.host.machine import survey


def run(
    config: Config,
    as_json: bool,
    host_only: bool,
    first: bool = False,
    state: StageState | None = None,
) -> int:
    """Print the report.

    Args:
        host_only: leave out what needs a model and its weights.
        first: the same; also the sizes of a model that is not there, unless it is V3.2.

    Returns:
        0 if no check failed, 1 otherwise.
    """
    export(config)
    machine = survey()
    values, notes = resolve(config, machine)
    memory = memory_line(values, machine)
    serving = _is_serving(run_directory(config["KT_RUN_DIR"]))
    situation = Situation(values, config.environment, machine, serving=serving)
    chosen = [check for check in CHECKS if check.host or not (host_only or first)]
    if first:
        from deploy.checks.needs import V32_REPOSITORIES  # it loads numpy

        if not (situation.needs.known or values["KT_MODEL_ID"] in V32_REPOSITORIES):
            chosen = [check for check in chosen if not check.sized]
            missing = f"the sizes of {values['KT_MODEL_ID']}"
            notes = (*notes, f"{missing} are not known yet: memory and disks are not checked")
    results = run_checks(situation, chosen)
    failures = [result.sentence() for result in results if result.status is Status.FAIL]
    failed = len(failures)
    if state is not None:
        state.fail("; ".join(failures)) if failures else state.set(DONE)
    if as_json:
        print(
            json.dumps(
                {
                    "ok": failed == 0,
                    "chosen": list(notes),
                    "gpu_memory": memory,
                    "needed_bytes": {"memory": round(situation.needs.memory(values))},
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


def _is_serving(directory: Path) -> bool:
    """Whether a server that says so in ``directory`` loads or serves."""
    state = read_state(directory, "serve")
    return state is not None and state.may_listen and state.is_alive(directory)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--host",
        action="store_true",
        help="only what the machine has; neither model nor weights have to be there yet",
    )
    parser.add_argument(
        "--first",
        action="store_true",
        help="the same before the first download: neither memory nor disks are compared with a "
        "model that is neither there nor V3.2",
    )
    parser.add_argument(
        "--tell", action="store_true", help="let `health` and the other stages know"
    )


STAGE = Stage(
    "check",
    "report what this machine and the directories have and lack",
    lambda config, args, state: run(config, args.json, args.host, args.first, state),
    _add_arguments,
    acts=lambda args: not args.host,
    keeps_state=lambda args: args.tell,
    writes_log=lambda args: args.tell and not args.json,
)
