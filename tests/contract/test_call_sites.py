"""Our signatures accept every call that published SGLang wheels make."""

import inspect
from collections.abc import Callable

import pytest

import kt_kernel
from tests.contract.call_sites import WRAPPER_CLASS, Call, CallSites, extract
from tests.contract.published_wheels import FORK_WHEEL, STOCK_WHEELS, PublishedWheel

ALL_WHEELS = (*STOCK_WHEELS, FORK_WHEEL)
INFERENCE_METHODS = {"load_weights", "submit_forward", "sync_forward"}
# What the fork calls for features that stock SGLang and DeepSeek V3.2 at AMXINT4/AMXINT8
# do not use. A method missing from both lists fails the test.
METHODS_OF_OTHER_FEATURES = {
    # LoRA on CPU experts (mode="sft")
    "init_lora_weights",
    "submit_forward_inference",
    "sync_forward_inference",
    # checkpoints read without conversion (methods RAWINT4, FP8, MXFP4)
    "load_block_fp8_weights",
    "load_rawint4_weights",
    # prefill of CPU experts layer by layer on the GPU, for those methods
    "submit_write_weight_scale_to_buffer",
    "sync_write_weight_scale_to_buffer",
}


@pytest.fixture(scope="module", params=ALL_WHEELS, ids=str)
def wheel(request: pytest.FixtureRequest) -> PublishedWheel:
    wheel: PublishedWheel = request.param
    return wheel


@pytest.fixture(scope="module")
def sites(wheel: PublishedWheel) -> CallSites:
    return extract(wheel.fetch())


def bind(function: Callable[..., object], call: Call, *, is_method: bool = False) -> None:
    """Bind ``call`` to ``function``; TypeError naming the call if it does not fit."""
    signature = inspect.signature(function)
    swallows = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    catch_all = [p.name for p in signature.parameters.values() if p.kind in swallows]
    if catch_all:
        raise TypeError(f"{call.function} takes *{catch_all[0]}: any call would seem to fit")
    placeholders = [None] * (call.positional + is_method)
    try:
        signature.bind(*placeholders, **dict.fromkeys(call.keywords))
    except TypeError as error:
        raise TypeError(f"{call}: {error}") from error


def is_fine_tuning(call: Call) -> bool:
    return ("mode", "sft") in call.constants


def test_imported_names_exist(sites: CallSites) -> None:
    assert {name for _, name in sites.imports} >= {WRAPPER_CLASS}
    missing = [f"{name} ({where})" for where, name in sites.imports if not hasattr(kt_kernel, name)]
    assert not missing


def test_constructions_bind(sites: CallSites) -> None:
    inference = [call for call in sites.constructions if not is_fine_tuning(call)]
    assert inference
    for call in inference:
        assert call.positional == 0
        assert {"layer_idx", "weight_path", "method"} <= set(call.keywords)
        bind(kt_kernel.KTMoEWrapper, call)


def test_stock_passes_a_count_and_the_fork_a_mask(sites: CallSites, wheel: PublishedWheel) -> None:
    for call in sites.constructions:
        if not is_fine_tuning(call):
            expected = "gpu_experts_mask" if wheel is FORK_WHEEL else "num_gpu_experts"
            assert expected in call.keywords


def test_static_calls_bind(sites: CallSites) -> None:
    assert {call.function for call in sites.static_calls} == {"set_capture_batch_sizes"}
    for call in sites.static_calls:
        bind(getattr(kt_kernel.KTMoEWrapper, call.function), call)


def test_method_calls_bind(sites: CallSites) -> None:
    assert {call.function for call in sites.method_calls} >= INFERENCE_METHODS
    for call in sites.method_calls:
        if call.function not in METHODS_OF_OTHER_FEATURES:
            bind(getattr(kt_kernel.KTMoEWrapper, call.function), call, is_method=True)


def test_mask_calls_bind(sites: CallSites, wheel: PublishedWheel) -> None:
    assert bool(sites.mask_calls) == (wheel is FORK_WHEEL)
    for call in sites.mask_calls:
        bind(kt_kernel.generate_gpu_experts_masks, call)


def test_a_missing_keyword_is_noticed(sites: CallSites) -> None:
    """Drop each keyword from our signature in turn: no call that passes it may bind."""
    ours = inspect.signature(kt_kernel.KTMoEWrapper)
    for call in sites.constructions:
        if is_fine_tuning(call):
            continue
        for keyword in call.keywords:

            def without_keyword() -> None: ...

            # inspect reads this attribute, which functions do not have.
            without_keyword.__signature__ = ours.replace(  # type: ignore[attr-defined]
                parameters=[p for p in ours.parameters.values() if p.name != keyword]
            )
            with pytest.raises(TypeError, match=keyword):
                bind(without_keyword, call)
