"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from kt_kernel import _ext

SUPPORTED = [name for name, supported in _ext.targets() if supported]
#: Targets with int8 activations; they must agree to the bit.
INTEGER_TARGETS = [name for name in SUPPORTED if name != "reference"]


def pytest_report_header() -> str:
    missing = [name for name, supported in _ext.targets() if not supported]
    absent = f"; this CPU cannot run {' '.join(missing)}" if missing else ""
    return f"kernel targets under test: {' '.join(SUPPORTED)}{absent}"


@pytest.fixture(params=INTEGER_TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each integer target that this CPU runs, forced by KT_TARGET."""
    monkeypatch.setenv("KT_TARGET", request.param)
    return request.param


@pytest.fixture(params=["AMXINT4", "AMXINT8"])
def method(request: pytest.FixtureRequest) -> str:
    """SGLang's --kt-method."""
    return request.param
