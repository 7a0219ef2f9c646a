"""Checks of the CPU on made-up machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.checks import cpu as checks_cpu
from deploy.checks import threads as checks_threads
from deploy.checks.result import Status
from tests.deploy.checks.situations import SERVER, one, tiny
from tests.deploy.helpers import LAPTOP, Prepared
from tests.kt_kernel.host.fake_machine import host


def facts(monkeypatch: pytest.MonkeyPatch, *features: str, best: str = "avx512_vnni") -> None:
    """A CPU with these features whose best target is ``best``."""
    order = ["avx512_vnni", "avx2", "scalar"]
    targets = [(name, order.index(name) >= order.index(best)) for name in order]
    found = targets, dict.fromkeys(features, True), "Some CPU"
    monkeypatch.setattr("deploy.checks.cpu.kernel_facts", lambda: found)


def test_instruction_set(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checks_cpu.check_instruction_set
    facts(monkeypatch, "avx2", "avx512_vnni")
    result = one(check, tmp_path)
    assert result.status is Status.PASS
    assert result.found == "target avx512_vnni on Some CPU with avx2 avx512_vnni"
    forced = one(check, tmp_path, KT_TARGET="scalar")
    assert (forced.status, forced.todo) == (Status.WARN, "set KT_TARGET=auto")
    facts(monkeypatch, "avx2", best="avx2")
    assert one(check, tmp_path).status is Status.WARN
    assert one(check, tmp_path, **tiny(prepared)).status is Status.PASS
    result = one(check, tmp_path, KT_TARGET="avx512_vnni")
    assert result.status is Status.FAIL
    assert result.todo == "set KT_TARGET to auto or one of avx2, scalar"


def test_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for features, status in (
        ((), Status.PASS),
        (("amx_tile", "amx_permitted"), Status.PASS),
        (("amx_tile",), Status.WARN),
    ):
        facts(monkeypatch, *features)
        assert one(checks_cpu.check_amx, tmp_path).status is status


def test_cpus_of_other_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 threads were "60 of 2 CPUs"; with none free, one thread was advised."""
    held: dict[int, int] = {}
    usable = [SimpleNamespace(id=0), SimpleNamespace(id=1)]
    monkeypatch.setattr(checks_threads, "holders", lambda *_: held)
    monkeypatch.setattr(checks_threads, "allowed_cpus", lambda _: usable)
    check = checks_threads.check_cpu_reservations
    result = one(check, tmp_path, KT_CPUINFER="60")
    assert (result.status, result.found) == (Status.PASS, "2")
    assert result.expected.startswith("2 of 2 CPUs that no other server")
    held[0] = 7
    assert "set KT_CPUINFER=1, less on the other" in one(check, tmp_path, KT_CPUINFER="2").todo
    held[1] = 7
    assert "set a lower KT_CPUINFER on the other" in one(check, tmp_path, KT_CPUINFER="1").todo


def test_cpu_limits(tmp_path: Path, prepared: Prepared) -> None:
    check = checks_threads.check_cpu_limits
    host(tmp_path)
    assert one(check, tmp_path).status is Status.PASS
    result = one(check, tmp_path, replace(SERVER, cpus=8, cores=8, cpu_quota=4.5))
    assert result.status is Status.WARN
    assert result.expected == "the use of all 128 CPUs"
    assert result.found == "a CPU set of 8, a quota of 4.5"
    assert one(check, tmp_path, LAPTOP, **tiny(prepared)).status is Status.PASS
