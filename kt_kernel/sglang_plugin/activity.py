"""Refuse to serve when --kt-* flags are given but the experts do not run in kt_kernel."""

import importlib
from collections.abc import Callable
from typing import Any

from kt_kernel.errors import UserError
from kt_kernel.installed import how_to_install
from kt_kernel.sglang_plugin import counting
from kt_kernel.sglang_plugin.device import runs_on_cpu
from kt_kernel.sglang_plugin.refusal import (
    refuse_to_serve,
    refusing_to_serve,
    sglang_version,
)

# Values of stock SGLang's --kt-* flags when they are not given.
KT_FLAG_DEFAULTS = {
    "kt_weight_path": None,
    "kt_method": "AMXINT4",
    "kt_cpuinfer": None,
    "kt_threadpool_count": 2,
    "kt_num_gpu_experts": None,
    "kt_max_deferred_experts_per_token": None,
}
REQUIRED_KT_FLAGS = ("kt_weight_path", "kt_cpuinfer", "kt_num_gpu_experts")


def check_kt_flags(result: None, server_args: Any) -> None:
    """After ``ServerArgs.check_server_args``, in the main process."""
    with refusing_to_serve("could not check the --kt-* flags"):
        given = {
            name
            for name, default in KT_FLAG_DEFAULTS.items()
            if getattr(server_args, name) != default
        }
        if not given:
            return
        missing = [_flag(name) for name in REQUIRED_KT_FLAGS if name not in given]
        if missing:
            raise UserError(
                f"{', '.join(_flag(name) for name in sorted(given))} given without "
                f"{' and '.join(missing)}: SGLang would not run the experts in kt_kernel; "
                f"add {' and '.join(missing)}"
            )
        _check_no_mtp(server_args)
        _check_placement(server_args)
        _check_available()


def _check_no_mtp(server_args: Any) -> None:
    """SGLang would ask for the MTP layer's experts under the index 0, which has none."""
    algorithm = getattr(server_args, "speculative_algorithm", None)
    if algorithm is None or algorithm.upper() not in ("EAGLE", "NEXTN"):
        return
    draft = server_args.speculative_draft_model_path
    if draft is None or draft == server_args.model_path:
        raise UserError(
            f"--speculative-algorithm {algorithm} drafts with the model's MTP layer, which SGLang "
            f"{sglang_version()} cannot run with CPU experts (docs/gpu-memory.md): leave it out"
        )


def _check_placement(server_args: Any) -> None:
    """On the CPU, SGLang 0.5.16 moves the experts' weights and not the router's ids."""
    moved = getattr(server_args, "init_expert_location", "trivial") != "trivial"
    if moved and runs_on_cpu() and sglang_version() == "0.5.16":
        raise UserError(
            "--init-expert-location is given, which SGLang 0.5.16 only follows on a GPU: set "
            "KT_EXPERT_PLACEMENT=first"
        )


def load_model_through_kt(
    load_model: Callable[..., None], runner: Any, *args: Any, **kwargs: Any
) -> None:
    """Around ``ModelRunner.load_model``.

    Mistakes in the weights, KT left out and CPU experts that compute something else are refused.
    """
    try:
        load_model(runner, *args, **kwargs)
        check_kt_is_in_use(runner)
        check_first_and_last_layer(runner)
        counting.remember(cpu_layers(runner))
    except UserError as error:
        refuse_to_serve(str(error))


def check_kt_is_in_use(runner: Any) -> None:
    """Raise :class:`UserError` unless every MoE layer runs through kt_kernel, if one should."""
    if runner.server_args.kt_weight_path is None or runner.is_draft_worker:
        return
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.kt_ep_wrapper import KTEPWrapperMethod

    layers = [module for module in runner.model.modules() if isinstance(module, FusedMoE)]
    through_kt = [layer for layer in layers if isinstance(layer.quant_method, KTEPWrapperMethod)]
    if not layers or len(through_kt) < len(layers):
        raise UserError(
            f"--kt-weight-path is given, but {len(through_kt)} of the {len(layers)} MoE layers of "
            f"{type(runner.model).__name__} run through kt_kernel in SGLang {sglang_version()}; "
            "serve a model with routed experts, or leave out the --kt-* flags"
        )


def cpu_layers(runner: Any) -> list[Any]:
    """The model's ``KTMoEWrapper`` of each layer, in order; none where none are asked for.

    In a tensor-parallel group only the first process has CPU experts. Raises :class:`UserError`
    where one is missing.
    """
    if runner.server_args.kt_weight_path is None or runner.is_draft_worker:
        return []
    from sglang.srt.layers.moe.kt_ep_wrapper import KTEPWrapperMethod

    methods = (getattr(module, "quant_method", None) for module in runner.model.modules())
    wrappers = [
        method.wrapper
        for method in methods
        if isinstance(method, KTEPWrapperMethod) and method.tp_rank == 0
    ]
    if None in wrappers:
        raise UserError(
            f"--kt-weight-path is given, but {wrappers.count(None)} of {len(wrappers)} MoE layers "
            f"have no CPU experts in SGLang {sglang_version()}: start again"
        )
    return sorted(wrappers, key=lambda wrapper: wrapper.layer_idx)


def check_first_and_last_layer(runner: Any) -> None:
    """Raise :class:`UserError` unless the CPU experts of the two give what their files say."""
    from kt_kernel.self_test import check_card, check_layer

    layers = cpu_layers(runner)
    for wrapper in layers[:1] + layers[1:][-1:]:
        check_layer(wrapper, runner.device, captures_graphs(runner.server_args))
        check_card(wrapper)


def captures_graphs(server_args: Any) -> bool:
    """Whether SGLang will capture CUDA graphs of the decode or of the prefill, on a GPU."""
    config = getattr(server_args, "cuda_graph_config", None)
    phases = (getattr(config, name, None) for name in ("decode", "prefill"))
    return any(phase is not None and phase.backend != "disabled" for phase in phases)


def _check_available() -> None:
    sglang_side = importlib.import_module("sglang.srt.layers.moe.kt_ep_wrapper")
    if sglang_side.KTRANSFORMERS_AVAILABLE:
        return
    try:
        from kt_kernel import KTMoEWrapper  # noqa: F401
    except ImportError as error:
        reason = f"kt_kernel cannot be imported: {error}"
    else:
        reason = "SGLang could not import it earlier in this process"
    raise UserError(
        f"--kt-* flags are given, but kt_kernel is not available to SGLang {sglang_version()}: "
        f"{reason}; {how_to_install()}, and run `python -m kt_kernel` with it"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
