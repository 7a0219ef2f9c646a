"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

from kt_kernel import _ext, packed
from tests import portable_isa
from tests.amx import tile_unit

#: Targets that this CPU runs as they are built.
NATIVE = [name for name, supported in _ext.targets() if supported]

#: Targets that stand-ins run in this process, and how.
STOOD_IN = {}
if tile_unit.IS_EMULATED:
    STOOD_IN["amx"] = "amx is emulated"
elif tile_unit.IS_PORTABLE:
    how = "amx and avx512_vnni are compiled with portable intrinsics"
    STOOD_IN = dict.fromkeys(portable_isa.TARGETS, how)

SUPPORTED = [name for name, _ in _ext.targets() if name in NATIVE or name in STOOD_IN]
#: Targets with int8 activations; they must agree to the bit.
INTEGER_TARGETS = [name for name in SUPPORTED if name != "reference"]


def pytest_sessionstart() -> None:
    # Not on import: pytest's own handler for SIGILL is set after that.
    tile_unit.install()


def pytest_report_header() -> str:
    notes = [f"kernel targets under test: {' '.join(SUPPORTED)}", *sorted(set(STOOD_IN.values()))]
    missing = [name for name, _ in _ext.targets() if name not in SUPPORTED]
    if missing:
        notes.append(f"this CPU cannot run {' '.join(missing)}")
    if tile_unit.ABSENT:
        notes.append(f"testing them with portable intrinsics {portable_isa.NEEDS}")
    return "; ".join(notes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=INTEGER_TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each integer target that this CPU runs or stand-ins run, forced by KT_TARGET."""
    monkeypatch.setenv("KT_TARGET", request.param)
    return request.param


@pytest.fixture(params=packed.METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each quantisation method."""
    return request.param
