"""--kt-* flags that would not take effect are refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin import activity
from kt_kernel.sglang_plugin.activity import (
    KT_FLAG_DEFAULTS,
    captures_graphs,
    check_first_and_last_layer,
    check_kt_flags,
    check_kt_is_in_use,
    load_model_through_kt,
)
from kt_kernel.wrapper import KTMoEWrapper
from tests.kt_kernel.layer_files import LAYOUTS, write_layer


class FusedMoE(torch.nn.Module):
    def __init__(self, quant_method: object) -> None:
        super().__init__()
        self.quant_method = quant_method


class KTEPWrapperMethod:
    def __init__(self, wrapper: object = None, tp_rank: int = 1) -> None:
        """Without arguments as in the processes that have no CPU experts."""
        self.wrapper, self.tp_rank = wrapper, tp_rank


@pytest.fixture(autouse=True)
def sglang_modules() -> Iterator[ModuleType]:
    """The two SGLang modules the checks read, small."""
    wrapper = ModuleType("sglang.srt.layers.moe.kt_ep_wrapper")
    vars(wrapper).update(KTRANSFORMERS_AVAILABLE=True, KTEPWrapperMethod=KTEPWrapperMethod)
    layer = ModuleType("sglang.srt.layers.moe.fused_moe_triton.layer")
    vars(layer).update(FusedMoE=FusedMoE)
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


@pytest.mark.parametrize("draft", [None, "/m"])
def test_drafting_with_the_mtp_layer_is_refused(
    draft: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model_path": "/m", "speculative_draft_model_path": draft}
    check_kt_flags(None, flags(**FULL, **given, speculative_algorithm="NGRAM"))
    check_kt_flags(None, flags(**given, speculative_algorithm="EAGLE"))  # no CPU experts
    other = {**given, "speculative_draft_model_path": "/other"}
    check_kt_flags(None, flags(**FULL, **other, speculative_algorithm="EAGLE"))
    with pytest.raises(SystemExit):
        check_kt_flags(None, flags(**FULL, **given, speculative_algorithm="NEXTN"))
    error = capsys.readouterr().err
    assert error.startswith(
        "error: --speculative-algorithm NEXTN drafts with the model's MTP layer"
    )


def test_experts_are_moved_by_a_version_that_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang 0.5.16 would give each token to the expert in the slot of that number."""
    monkeypatch.setenv("KT_DEVICE", "cpu")
    moved = flags(**FULL, init_expert_location="/map.json")
    check_kt_flags(None, moved)
    monkeypatch.setattr(activity, "sglang_version", lambda: "0.5.16")
    check_kt_flags(None, flags(**FULL, init_expert_location="trivial"))
    with pytest.raises(SystemExit):
        check_kt_flags(None, moved)
    assert "set KT_EXPERT_PLACEMENT=first" in capsys.readouterr().err
    monkeypatch.setenv("KT_DEVICE", "cuda")
    check_kt_flags(None, moved)


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
        device="cpu",
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


@pytest.mark.parametrize(
    ("decode", "prefill", "expected"),
    [("full", "disabled", True), ("disabled", "full", True), ("disabled", "disabled", False)],
)
def test_whether_graphs_are_captured(decode: str, prefill: str, expected: bool) -> None:
    phases = {"decode": decode, "prefill": prefill}
    config = SimpleNamespace(**{n: SimpleNamespace(backend=b) for n, b in phases.items()})
    assert captures_graphs(SimpleNamespace(cuda_graph_config=config)) == expected


def loaded_layers(folder: Path, damaged: int | None = None) -> Any:
    """A runner of layers 3 to 6 in any order; of one, memory and file differ."""
    methods = []
    for layer_idx in (5, 3, 6, 4):
        path = write_layer(folder, LAYOUTS["int8"], layer_idx)
        wrapper = KTMoEWrapper(
            layer_idx, 4, 2, 256, 64, 0, weight_path=str(folder), method="AMXINT8"
        )
        wrapper.load_weights(torch.arange(4))
        if layer_idx == damaged:
            sound = path.read_bytes()
            path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))  # a scale, of the last expert
        methods.append(KTEPWrapperMethod(wrapper, tp_rank=0))
    return runner(*methods)


def test_the_first_and_the_last_layer_are_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        load_model_through_kt(lambda runner: None, loaded_layers(tmp_path))
    tested = [text for text in caplog.messages if "self-test" in text]
    assert [text.split(":")[1] for text in tested] == [
        " self-test of layer 3",
        " self-test of layer 6",
    ]
    for damaged in (3, 6):
        with pytest.raises(SystemExit) as stop:
            load_model_through_kt(lambda runner: None, loaded_layers(tmp_path, damaged))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: self-test of layer {damaged}: ")
        assert error.count("\n") == 1


def test_layers_without_cpu_experts_are_refused_in_the_first_process() -> None:
    check_first_and_last_layer(runner(KTEPWrapperMethod(), KTEPWrapperMethod()))
    with pytest.raises(UserError, match="1 of 1 MoE layers have no CPU experts"):
        check_first_and_last_layer(runner(KTEPWrapperMethod(tp_rank=0)))


def test_other_errors_are_sglangs() -> None:
    def load_model(runner: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        load_model_through_kt(load_model, runner())
