"""Made-up machines and what one check finds on them."""

from __future__ import annotations

from pathlib import Path

from deploy.checks.result import Result, Status
from deploy.checks.situation import Check, Situation
from deploy.launch.argv import resolve
from deploy.settings.config import load
from kt_kernel.host.machine import Machine
from tests.deploy.helpers import L20, Prepared, with_gpu

SERVER = with_gpu(L20)


def situation(root: Path, machine: Machine = SERVER, /, **settings: str) -> Situation:
    settings = {"KT_MODEL_PATH": "/no/model", "KT_WEIGHT_PATH": "/no/weights", **settings}
    config = load(settings)
    values, _ = resolve(config, machine)
    return Situation(values, config.environment, machine, root)


def one(check: Check, root: Path, machine: Machine = SERVER, /, **settings: str) -> Result:
    """The only result of a check; it says what to do unless it passes."""
    (result,) = check(situation(root, machine, **settings))
    assert (result.todo == "") == (result.status is Status.PASS), result
    assert "\n" not in result.sentence()
    return result


def tiny(prepared: Prepared) -> dict[str, str]:
    return {"KT_MODEL_PATH": str(prepared.model), "KT_WEIGHT_PATH": str(prepared.int4)}
