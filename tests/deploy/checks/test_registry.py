"""All checks together: their names, which are ignored, which need a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.checks import machine as checks_machine
from deploy.checks.registry import CHECKS, run_checks
from deploy.checks.result import Status
from tests.deploy.checks.situations import situation
from tests.deploy.helpers import H200, run, with_gpu
from tests.kt_kernel.host.fake_machine import host, write


def test_the_report_has_all_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check that KT_IGNORE_CHECKS takes finds something, in the order of its list."""
    monkeypatch.setattr("deploy.checks.gpu.torch_cuda_version", lambda: (13, 0))
    host(tmp_path, 512, CommitLimit=500, Committed_AS=1)
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    write(tmp_path, {"model/config.json": "{}"})
    settings = {"KT_WEIGHT_CACHE": str(tmp_path / "cache"), "KT_PUBLISHED_HOST": "127.0.0.1"}
    settings["KT_MODEL_PATH"] = str(tmp_path / "model")
    here = situation(tmp_path, with_gpu(H200), **settings)
    names = [r.check for r in run_checks(here, CHECKS)]
    assert list(dict.fromkeys(names)) == [check.name for check in CHECKS]


def test_ignored_failures_are_warnings(tmp_path: Path) -> None:
    here = situation(host(tmp_path, 8), KT_IGNORE_CHECKS="memory,disk")
    (result,) = run_checks(here, [checks_machine.check_memory])
    assert result.status is Status.WARN
    assert result.todo.endswith("(KT_IGNORE_CHECKS ignores it)")
    everything = situation(tmp_path, KT_IGNORE_CHECKS="all")
    assert {r.status for r in run_checks(everything, CHECKS)} <= {Status.PASS, Status.WARN}


def test_an_unknown_name_to_ignore() -> None:
    result = run("serve", KT_IGNORE_CHECKS="memory,vramm")
    assert result.returncode == 2
    assert "KT_IGNORE_CHECKS: expected all, or names separated by commas out of" in result.stderr


def test_the_host_alone_needs_no_model() -> None:
    result = run("check", "--host", KT_MODEL_PATH="/no", KT_DEVICE="cpu", KT_IGNORE_CHECKS="all")
    assert result.returncode == 0, result
    names = [line.split(": ")[1] for line in result.stdout.splitlines() if ": expected" in line]
    assert {"memory", "disk", "instruction-set"} <= set(names)
    assert not {"model", "weights"} & set(names)
