"""python -m kt_kernel, and what importing the package costs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from kt_kernel import _ext
from kt_kernel.__main__ import main
from tests.conftest import INTEGER_TARGETS, NATIVE


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        env={k: v for k, v in os.environ.items() if k != "KT_TARGET"} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_says_what_would_run() -> None:
    result = run("-m", "kt_kernel")
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(":", 1) for line in result.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["target"] == _ext.resolve_target("")
    assert rows["Python"] == platform.python_version()
    assert "node" in rows["NUMA (usable)"]
    flags = {name for name, present in _ext.cpu_features() if present}
    assert set(rows["features"].split()) == flags


def test_features_are_the_kernels_own() -> None:
    """CPUID as we read it against what Linux reports."""
    with open("/proc/cpuinfo") as file:  # noqa: PTH123 (a proc file, read once)
        linux = set(next(line for line in file if line.startswith("flags")).split())
    ours = dict(_ext.cpu_features())
    for name in ("avx2", "fma", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"):
        assert ours[name] == (name in linux), name
    assert ours["avx512"] == ({"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= linux)


@pytest.mark.parametrize("target", sorted(set(INTEGER_TARGETS) & set(NATIVE)))
def test_target_can_be_forced(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KT_TARGET", target)
    assert main() == 0
    assert f"target:             {target}\n" in capsys.readouterr().out


def test_target_must_be_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KT_TARGET", "amx512")
    assert main() == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: KT_TARGET: target 'amx512' is unknown: expected one of")
    assert printed.count("\n") == 1


def test_importing_the_package_loads_no_torch() -> None:
    code = "import kt_kernel, kt_kernel.packed, sys; print('torch' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"
