"""Everything we change in SGLang, as data; its installation; the check that it took."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin import activity, counting, ending, listening, rendezvous, scaling
from kt_kernel.sglang_plugin.cpu_mode import attention, config, experts, fp8_loading
from kt_kernel.sglang_plugin.device import check_cpu_environment, runs_on_cpu
from kt_kernel.sglang_plugin.edge import (
    answers,
    health,
    mistakes,
    own_requests,
    scheduler,
    tokenizer,
)
from kt_kernel.sglang_plugin.refusal import TESTED_SGLANG, refusing_to_serve, sglang_version
from kt_kernel.sglang_plugin.tool_calls import detector

Kind = Literal["before", "after", "around", "replace", "entry"]


@dataclass(frozen=True)
class Hook:
    """One change to SGLang.

    target: dotted path of a function or method; for kind "entry" the path of a
        dictionary followed by a key, ``module.DICTIONARY[key]``.
    kind: as in SGLang's ``HookType`` (before, after, around, replace), or "entry".
    function: what is hooked in, or the value of the dictionary entry.
    reason: why stock SGLang needs it.
    when: "always", or "cpu" for servers without a GPU.
    """

    target: str
    kind: Kind
    function: Callable[..., Any]
    reason: str
    when: Literal["always", "cpu"]


HOOKS: list[Hook] = [
    Hook(
        "sglang.srt.layers.moe.kt_ep_wrapper.KTEPWrapperMethod.create_moe_runner",
        "before",
        scaling.scale_routed_experts_once,
        "the runner of the GPU experts applies routed_scaling_factor, and then the model does",
        "always",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "after",
        activity.check_kt_flags,
        "incomplete --kt-* flags silently load every expert on the GPU",
        "always",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        "around",
        activity.load_model_through_kt,
        "a model whose MoE layers bypass KTEPWrapperMethod ignores --kt-* silently; weights that "
        "do not fit end in a traceback; nothing tests what the CPU experts compute",
        "always",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.run_event_loop",
        "before",
        counting.count_from_now,
        "keeps no count of how often experts are used; before this, the tokens are nobody's",
        "always",
    ),
    Hook(
        "sglang.srt.distributed.parallel_state.init_distributed_environment",
        "before",
        rendezvous.listen_on_one_address,
        "PyTorch's store of keys and values listens on all addresses, without authentication",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        listening.refuse_taken_address,
        "waits for ten minutes when another program took the port while the model loaded",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._wait_and_warmup",
        "after",
        ending.tell_ready,
        "tells nobody who does not ask that it is ready, and is asked in vain once it has ended",
        "always",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler",
        "before",
        ending.tell_ending,
        "leaves no trace that its end was ordered",
        "always",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
        "after",
        ending.end_like_terminate,
        "ends on SIGINT, Ctrl-C, in the middle of requests and with tracebacks",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server.set_global_state",
        "before",
        tokenizer.serve_within_limits,
        "one key opens all routes, and GET changes the server; a number in a body that a kernel "
        "cannot take ends it; the context length that is told is not what the KV cache holds",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server.__dict__[requests]",
        "entry",
        own_requests.OwnRequests,
        "asks itself for its first token, with a key that it should not know",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response",
        "around",
        mistakes.tell_mistake,
        "500 for messages that the chat template or its encoder refuses; answers of many lines",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
        ".create_error_response",
        "around",
        mistakes.tell_mistake,
        "the same for /v1/responses",
        "always",
    ),
    Hook(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._error_response",
        "around",
        mistakes.tell_mistake,
        "the same for /v1/messages",
        "always",
    ),
    Hook(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "around",
        tokenizer.normalize_checked,
        "the same for a route whose bodies are not checked; malformed requests end in 500",
        "always",
    ),
    Hook(
        "sglang.srt.managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments",
        "around",
        tokenizer.normalize_checked,
        "as for GenerateReqInput",
        "always",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "around",
        tokenizer.tokenized_checked,
        "verifies neither token ids nor most numbers before they go to the scheduler",
        "always",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_input_requests",
        "around",
        scheduler.process_each_request,
        "the scheduler ends, and the server with it, when a request raises",
        "always",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "after",
        health.tell_batch,
        "tells nobody outside of the scheduler that a long prompt makes progress",
        "always",
    ),
    Hook(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.fill_vocab_mask",
        "around",
        answers.open_dead_end,
        "a grammar that allows no token makes all probabilities NaN, which ends the server",
        "always",
    ),
    Hook(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.accept_token",
        "around",
        answers.accept_or_dead_end,
        "ends the request whose grammar allows no token",
        "always",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.FINISH_ABORT.__init__",
        "around",
        answers.blame_client,
        "answers 500 to a grammar that allows no token",
        "always",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.__dict__[re]",
        "entry",
        answers.TimedRe,
        "searches for a client's stop_regex without a limit of time; all requests wait",
        "always",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.Req._check_str_based_finish",
        "around",
        answers.finish_or_refuse,
        "does not everywhere expect that the search raises",
        "always",
    ),
    Hook(
        "sglang.srt.function_call.deepseekv32_detector.DeepSeekV32Detector.has_tool_call",
        "replace",
        detector.has_tool_call,
        "as for detect_and_parse: the two agree on where an answer's text ends",
        "always",
    ),
    Hook(
        "sglang.srt.function_call.deepseekv32_detector.DeepSeekV32Detector.detect_and_parse",
        "replace",
        detector.detect_and_parse,
        "strips the whitespace of string arguments, and loses a call whose section has no end tag",
        "always",
    ),
    Hook(
        "sglang.srt.function_call.deepseekv32_detector.DeepSeekV32Detector"
        ".parse_streaming_increment",
        "replace",
        detector.parse_streaming_increment,
        "strips the whitespace of string arguments; finds other calls than detect_and_parse",
        "always",
    ),
    Hook(
        "sglang.srt.utils.hf_transformers.config.get_config",
        "after",
        config.run_dense_and_unquantized,
        "FP8 linears and sparse attention have no kernels for a CPU without AMX",
        "cpu",
    ),
    Hook(
        "sglang.srt.models.deepseek_v2.DeepseekV2ForCausalLM.load_weights",
        "before",
        fp8_loading.load_dequantized,
        "the FP8 checkpoint goes into unquantised layers; CPU experts are not SGLang's to load",
        "cpu",
    ),
    Hook(
        "sglang.srt.layers.moe.kt_ep_wrapper.KTEPWrapperMethod.process_weights_after_loading",
        "replace",
        experts.process_weights_after_loading,
        "calls torch.cuda.synchronize",
        "cpu",
    ),
    Hook(
        "sglang.srt.layers.moe.kt_ep_wrapper.KTEPWrapperMethod.apply",
        "replace",
        experts.apply,
        "asks for a CUDA stream; SGLang's CPU experts take neither id -1 nor repeated ids",
        "cpu",
    ),
    Hook(
        "sglang.srt.models.deepseek_common.attention_backend_handler"
        ".AttentionBackendRegistry._handlers[torch_native]",
        "entry",
        attention.absorbed_mla,
        "torch_native has no handler for MLA models",
        "cpu",
    ),
    Hook(
        "sglang.srt.models.deepseek_common.attention_backend_handler"
        ".AttentionBackendRegistry._handlers[triton]",
        "entry",
        attention.absorbed_mla,
        "Triton's handler picks a prefill that torch_native cannot run",
        "cpu",
    ),
    Hook(
        "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS[triton]",
        "entry",
        attention.create_torch_native_backend,
        "Triton has no CPU backend; the tutorial's flags ask for it",
        "cpu",
    ),
    Hook(
        "sglang.srt.utils.common.support_triton",
        "replace",
        attention.support_triton,
        "SGLang 0.5.16 takes the backend's name, triton, as proof that Triton kernels can run",
        "cpu",
    ),
]


def active_hooks(hooks: Iterable[Hook], on_cpu: bool) -> list[Hook]:
    """Those of ``hooks`` that a server with (without) a GPU needs."""
    return [hook for hook in hooks if hook.when == "always" or on_cpu]


def install() -> None:
    """Register the active hooks with SGLang's HookRegistry and check them once applied.

    SGLang applies hooks after all plugins have registered theirs and only logs the
    ones that fail, so ``apply_hooks`` is made to end with our check. Raises
    :class:`UserError` if the environment is wrong, and what importing an unknown
    SGLang raises.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    on_cpu = runs_on_cpu()
    if on_cpu:
        check_cpu_environment()
    hooks = active_hooks(HOOKS, on_cpu)
    for hook in hooks:
        if hook.kind != "entry":
            HookRegistry.register(hook.target, hook.function, HookType(hook.kind))

    apply_hooks = HookRegistry.apply_hooks

    def apply_and_check(cls: type) -> None:
        apply_hooks()
        with refusing_to_serve("could not apply the kt_kernel plugin's hooks"):
            set_entries(hooks)
            check(hooks)

    HookRegistry.apply_hooks = classmethod(apply_and_check)


def set_entries(hooks: Iterable[Hook]) -> None:
    """Set the dictionary entries among ``hooks``; raise UserError naming one that fails."""
    for hook in hooks:
        if hook.kind == "entry":
            dictionary, key = _entry(hook)
            dictionary[key] = hook.function


def check(hooks: Iterable[Hook]) -> None:
    """Raise :class:`UserError` naming every hook that is not in place."""
    missing = [hook for hook in hooks if not is_in_place(hook)]
    if missing:
        causes = [import_failure(hook.target) for hook in missing]
        if all(causes):
            raise UserError(
                f"SGLang {sglang_version()} cannot be imported as a whole, so the kt_kernel "
                f"plugin's hooks are not in place: {'; '.join(sorted({*map(str, causes)}))}"
            )
        names = ", ".join(f"{hook.target} ({hook.kind})" for hook in missing)
        why = "".join(f"; {cause}" for cause in sorted({cause for cause in causes if cause}))
        raise UserError(
            f"SGLang {sglang_version()} did not take {len(missing)} of the kt_kernel plugin's "
            f"hooks: {names}{why}; its answers would be wrong, so it does not serve; "
            f"{TESTED_SGLANG}"
        )


def is_in_place(hook: Hook) -> bool:
    """True if SGLang now calls ``hook.function`` at ``hook.target``."""
    if hook.kind == "entry":
        dictionary, key = _entry(hook)
        return dictionary.get(key) is hook.function
    try:
        current = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return False
    # Each hook on a target is one wrapper around the one before it; the wrapper
    # holds the hook in its closure and what it wraps in __wrapped__.
    while current is not None:
        cells = getattr(current, "__closure__", None) or ()
        if any(_contents(cell) is hook.function for cell in cells):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def import_failure(target: str) -> str | None:
    """Why the module of ``target`` cannot be imported; None if it can.

    SGLang's registry says of a module that fails to import (for want of a GPU library, say) only
    that its package has no such attribute.
    """
    name = ""
    for part in target.split("."):
        name = f"{name}.{part}".lstrip(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:  # a class or function: the module before it was the last
                return None
            return f"{name} cannot be imported: {error}"
        except Exception as error:
            return f"{name} cannot be imported: {type(error).__name__}: {error}"
    return None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _entry(hook: Hook) -> tuple[dict[str, Any], str]:
    path, _, key = hook.target.removesuffix("]").partition("[")
    try:
        dictionary = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"SGLang {sglang_version()} has no {path} ({error}), which the kt_kernel plugin needs "
            f"because {hook.reason}; {TESTED_SGLANG}"
        ) from error
    if not isinstance(dictionary, dict):
        raise UserError(
            f"{path} of SGLang {sglang_version()} is a {type(dictionary).__name__}; "
            "the kt_kernel plugin expected a dict"
        )
    return dictionary, key
