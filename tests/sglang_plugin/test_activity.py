"""--kt-* flags that would not take effect are refused."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin.activity import (
    KT_FLAG_DEFAULTS,
    check_kt_flags,
    check_kt_is_in_use,
    load_model_through_kt,
)


class FusedMoE(torch.nn.Module):
    def __init__(self, quant_method: object) -> None:
        super().__init__()
        self.quant_method = quant_method


class KTEPWrapperMethod:
    pass


@pytest.fixture(autouse=True)
def sglang_modules() -> Iterator[ModuleType]:
    """The two SGLang modules the checks read, small."""
    wrapper = ModuleType("sglang.srt.layers.moe.kt_ep_wrapper")
    wrapper.KTRANSFORMERS_AVAILABLE = True  # type: ignore[attr-defined]
    wrapper.KTEPWrapperMethod = KTEPWrapperMethod  # type: ignore[attr-defined]
    layer = ModuleType("sglang.srt.layers.moe.fused_moe_triton.layer")
    layer.FusedMoE = FusedMoE  # type: ignore[attr-defined]
    modules = {wrapper.__name__: wrapper, layer.__name__: layer}
    for name in list(modules):
        parents = name.split(".")[:-1]
        for length in range(1, len(parents) + 1):
            parent = ".".join(parents[:length])
            modules.setdefault(parent, ModuleType(parent))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield wrapper


def flags(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**KT_FLAG_DEFAULTS, **given})


FULL = {"kt_weight_path": "/w", "kt_cpuinfer": 60, "kt_num_gpu_experts": 1}


@pytest.mark.parametrize("given", [{}, FULL, {**FULL, "kt_num_gpu_experts": 0}])
def test_complete_flags_pass(given: dict[str, Any]) -> None:
    check_kt_flags(None, flags(**given))


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"kt_cpuinfer": 60, "kt_num_gpu_experts": 1}, "--kt-weight-path"),
        ({"kt_method": "AMXINT8"}, "--kt-weight-path and --kt-cpuinfer and --kt-num-gpu-experts"),
        ({"kt_weight_path": "/w", "kt_num_gpu_experts": 1}, "--kt-cpuinfer"),
        ({"kt_weight_path": "/w", "kt_cpuinfer": 60}, "--kt-num-gpu-experts"),
    ],
)
def test_incomplete_flags_are_refused(
    given: dict[str, Any], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        check_kt_flags(None, flags(**given))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"add {missing}\n" in error


def test_unavailable_kt_kernel_is_refused(
    sglang_modules: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sglang_modules.KTRANSFORMERS_AVAILABLE = False
    check_kt_flags(None, flags())
    with pytest.raises(SystemExit):
        check_kt_flags(None, flags(**FULL))
    assert "kt_kernel is not available to SGLang" in capsys.readouterr().err


def runner(*quant_methods: object, weight_path: str | None = "/w", draft: bool = False) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(kt_weight_path=weight_path),
        is_draft_worker=draft,
        model=torch.nn.Sequential(*(FusedMoE(method) for method in quant_methods)),
    )


def test_model_through_kt_passes() -> None:
    check_kt_is_in_use(runner(KTEPWrapperMethod(), KTEPWrapperMethod()))


def test_no_kt_flags_or_a_draft_model_pass() -> None:
    check_kt_is_in_use(runner(object(), weight_path=None))
    check_kt_is_in_use(runner(object(), draft=True))


@pytest.mark.parametrize(
    ("methods", "count"),
    [((), "0 of the 0"), ((object(),), "0 of the 1"), ((KTEPWrapperMethod(), 1), "1 of the 2")],
)
def test_model_past_kt_is_refused(methods: tuple[object, ...], count: str) -> None:
    with pytest.raises(UserError, match=f"{count} MoE layers"):
        check_kt_is_in_use(runner(*methods))


def test_mistakes_in_the_weights_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def load_model(runner: object) -> None:
        raise UserError("layer-003.safetensors is cut short")

    with pytest.raises(SystemExit) as stop:
        load_model_through_kt(load_model, runner(KTEPWrapperMethod()))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: layer-003.safetensors is cut short\n"


def test_loading_checks_that_kt_is_in_use() -> None:
    loaded: list[object] = []
    through_kt = runner(KTEPWrapperMethod())
    load_model_through_kt(loaded.append, through_kt)
    assert loaded == [through_kt]
    with pytest.raises(SystemExit):
        load_model_through_kt(loaded.append, runner(object()))


def test_other_errors_are_sglangs() -> None:
    def load_model(runner: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        load_model_through_kt(load_model, runner())
