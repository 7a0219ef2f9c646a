"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from kt_kernel import _ext
from tests.amx import emulator

EMULATES_AMX = not emulator.is_native() and emulator.can_emulate()

SUPPORTED = [
    name for name, supported in _ext.targets() if supported or (name == "amx" and EMULATES_AMX)
]
#: Targets with int8 activations; they must agree to the bit.
INTEGER_TARGETS = [name for name in SUPPORTED if name != "reference"]


def pytest_sessionstart() -> None:
    # Not on import: pytest's own handler for SIGILL is set after that.
    if EMULATES_AMX:
        emulator.install()


def pytest_report_header() -> str:
    missing = [name for name, _ in _ext.targets() if name not in SUPPORTED]
    absent = f"; this CPU cannot run {' '.join(missing)}" if missing else ""
    how = "; amx is emulated" if EMULATES_AMX else ""
    return f"kernel targets under test: {' '.join(SUPPORTED)}{how}{absent}"


@pytest.fixture(params=INTEGER_TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each integer target that this CPU runs, forced by KT_TARGET."""
    monkeypatch.setenv("KT_TARGET", request.param)
    return request.param


@pytest.fixture(params=["AMXINT4", "AMXINT8"])
def method(request: pytest.FixtureRequest) -> str:
    """SGLang's --kt-method."""
    return request.param
