"""The extraction itself: what it finds in a wheel written for the purpose."""

import zipfile
from pathlib import Path

import pytest

from tests.contract.call_sites import WRAPPER_MODULE, CallSites, extract

SOURCE = """
try:
    from kt_kernel import KTMoEWrapper, generate_gpu_experts_masks
except ImportError:
    pass

class Method:
    def create(self, fast):
        shared = dict(layer_idx=0, numa_nodes=None)
        extra = {"group_size": 32} if fast else {}
        self.wrapper = KTMoEWrapper(**shared, **extra, method="X", mode="sft")
        KTMoEWrapper.set_capture_batch_sizes([1])
        generate_gpu_experts_masks(1, 2)

    def run(self, x):
        self.wrapper.submit_forward(x, x, x, 0)
        return self.wrapper.sync_forward(x, cuda_stream=0)
"""


def wheel_with(tmp_path: Path, source: str) -> Path:
    wheel = tmp_path / "sglang-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(WRAPPER_MODULE, source)
        archive.writestr("sglang/unrelated.py", "KTMoEWrapper()")
    return wheel


@pytest.fixture
def sites(tmp_path: Path) -> CallSites:
    return extract(wheel_with(tmp_path, SOURCE))


def test_finds_imports_behind_try(sites: CallSites) -> None:
    assert [name for _, name in sites.imports] == ["KTMoEWrapper", "generate_gpu_experts_masks"]


def test_expands_keyword_dictionaries(sites: CallSites) -> None:
    (call,) = sites.constructions
    assert call.keywords == ("layer_idx", "numa_nodes", "group_size", "method", "mode")
    assert ("mode", "sft") in call.constants


def test_finds_static_method_and_mask_calls(sites: CallSites) -> None:
    assert [call.function for call in sites.static_calls] == ["set_capture_batch_sizes"]
    assert [(call.function, call.positional, call.keywords) for call in sites.method_calls] == [
        ("submit_forward", 4, ()),
        ("sync_forward", 1, ("cuda_stream",)),
    ]
    assert [call.positional for call in sites.mask_calls] == [2]


def test_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    source = "import kt_kernel\ndef f(options):\n    KTMoEWrapper(**options)\n"
    with pytest.raises(ValueError, match=r"\*\*options"):
        extract(wheel_with(tmp_path, source))
