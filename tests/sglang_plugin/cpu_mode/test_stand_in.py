"""The sgl_kernel stand-in: importable, and every function in it raises."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from kt_kernel.sglang_plugin.device import STAND_IN_PATH


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STAND_IN_PATH))
    yield importlib.import_module("sgl_kernel")
    for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
        del sys.modules[name]


def test_every_function_raises_its_name(stand_in: ModuleType) -> None:
    assert stand_in.__file__ is not None
    assert stand_in.__file__.startswith(str(STAND_IN_PATH))
    assert stand_in.STUBBED_FUNCTIONS
    for name in stand_in.STUBBED_FUNCTIONS:
        with pytest.raises(NotImplementedError, match=f"sgl_kernel.{name} was called"):
            getattr(stand_in, name)(1, keyword=2)


def test_other_names_do_not_exist(stand_in: ModuleType) -> None:
    assert not hasattr(stand_in, "moe_align_block_size")


def test_scalar_types_are_names_only(stand_in: ModuleType) -> None:
    from sgl_kernel.scalar_type import ScalarType, scalar_types

    assert isinstance(scalar_types.uint4, ScalarType)
    assert len({scalar_types.uint4, scalar_types.uint4b8, scalar_types.uint8b128}) == 3
    assert not hasattr(scalar_types.uint4, "size_bits")
