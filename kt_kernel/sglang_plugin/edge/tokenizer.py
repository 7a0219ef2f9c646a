"""The checks in SGLang's main process: at its HTTP server, and at what goes to the scheduler."""

import os
from collections.abc import Callable
from typing import Any

from kt_kernel.sglang_plugin.edge.access import CORS, Guarded, keys_of, origins_of, own_key
from kt_kernel.sglang_plugin.edge.check import problem_of_object, problem_of_sampling
from kt_kernel.sglang_plugin.edge.fields import MAX_LOGPROBS, SAMPLING
from kt_kernel.sglang_plugin.edge.health import Health, log_no_probes
from kt_kernel.sglang_plugin.edge.http import CheckedRequests
from kt_kernel.sglang_plugin.edge.kinds import UNLIMITED, Limits, Problem, Said, TokenIds
from kt_kernel.sglang_plugin.edge.mistakes import Mistakes, handed_on, tell_invalid, unreadable

_limits = UNLIMITED


def current_limits() -> Limits:
    """Those of this process's server."""
    return _limits


def limits_of(manager: Any) -> Limits:
    """What a ``TokenizerManager`` serves."""
    vocabulary = int(manager.model_config.vocab_size)
    # Such a server shortens what is too long.
    long = getattr(manager, "allow_auto_truncate", False)
    context = UNLIMITED.context if long else int(manager.context_len)
    return Limits(vocabulary, context, int(manager.model_config.hidden_size))


def serve_within_limits(global_state: Any) -> None:
    """Before ``set_global_state`` of SGLang's HTTP server, in each process that serves HTTP.

    The context length becomes what the scheduler takes, wherever SGLang tells it or compares with
    it; the limits become known; and the application checks who asks and each body.
    """
    global _limits
    own_key()  # before other processes are started, which inherit it
    manager = global_state.tokenizer_manager
    # The main process of several that serve has a router of their answers here.
    if not hasattr(manager, "model_config"):
        return
    tell_served_context(manager, global_state.scheduler_info)
    _limits = limits_of(manager)
    guard(manager)


def closed_routes(server_args: Any) -> frozenset[str]:
    """Routes at which SGLang's scheduler raises, and the server ends: without a recorder."""
    if server_args.expert_distribution_recorder_mode is not None:
        return frozenset()
    return frozenset(
        f"/{action}_expert_distribution_record" for action in ("start", "stop", "dump")
    )


def tell_served_context(manager: Any, scheduler_info: Any) -> None:
    """Have ``manager`` tell and check the context length that its scheduler serves.

    SGLang tells the checkpoint's (``max_model_len``), although the memory of the KV cache may be
    smaller. The scheduler takes prompts below ``max_req_input_len``: each of them, and as many
    tokens more as are left to that number, is served in full.
    """
    served = int(scheduler_info["max_req_input_len"])
    manager.context_len = min(int(manager.context_len), served)
    manager.model_config.context_len = manager.context_len
    # What /tokenize tells. It cuts no text: SGLang asks for no truncation.
    if getattr(manager.tokenizer, "model_max_length", 0) > manager.context_len:
        manager.tokenizer.model_max_length = manager.context_len


def guard(manager: Any) -> None:
    """Put the checks of who asks, and then of what is asked, before SGLang's application.

    SGLang lets the pages of all origins ask with their visitors' credentials; here none may, unless
    it is named.
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from sglang.srt.entrypoints.http_server import app

    log_no_probes()
    server_args = manager.server_args
    keys, origins = keys_of(server_args, os.environ), origins_of(os.environ)
    # In one of several processes the application runs already: its next request builds it again.
    app.middleware_stack = None
    app.user_middleware[:] = [one for one in app.user_middleware if one.cls is not CORSMiddleware]
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_middleware(Mistakes)
    app.add_middleware(Health, manager=manager)
    app.add_middleware(CheckedRequests, limits=current_limits, closed=closed_routes(server_args))
    app.add_middleware(Guarded, keys=keys, origins=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=sorted(origins), **CORS)


def normalize_checked(normalize: Callable[..., None], request: Any) -> None:
    """Around ``normalize_batch_and_arguments`` of a request, whichever route made it."""
    problem = problem_of_object(vars(request), _limits)
    if problem is not None:
        raise ValueError(str(problem))
    _or_value_error(normalize, request)


def tokenized_checked(
    create: Callable[..., Any],
    manager: Any,
    obj: Any,
    input_text: Any,
    input_ids: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around ``TokenizerManager._create_tokenized_object``: what goes to the scheduler.

    Raises ValueError, which each route answers with 400.
    """
    limits = limits_of(manager)
    if input_ids is not None:
        # Of a session, the scheduler has the tokens before.
        least = 0 if getattr(obj, "session_params", None) else 1
        for problem in TokenIds(least=least).problems("the prompt", list(input_ids), limits):
            raise ValueError(str(problem))
    tokenized = _or_value_error(create, manager, obj, input_text, input_ids, *args, **kwargs)
    sampling = tokenized.sampling_params
    fields = {name: getattr(sampling, name, None) for name in SAMPLING}
    wrong = problem_of_sampling(fields, limits)
    if wrong is None and sampling.stop_token_ids:
        wrong = next(
            TokenIds().problems("stop_token_ids", [*sampling.stop_token_ids], limits), None
        )
    wrong = wrong or _too_many_logprobs(tokenized, limits)
    if wrong is not None:
        raise ValueError(str(wrong))
    handed_on()
    return tokenized


def _too_many_logprobs(tokenized: Any, limits: Limits) -> Problem | None:
    if not getattr(tokenized, "return_logprob", False):
        return None
    prompt, start = len(tokenized.input_ids or ()), tokenized.logprob_start_len
    answer = tokenized.sampling_params.max_new_tokens
    tokens = limits.context - prompt if answer is None else answer
    if start >= 0:
        tokens += max(prompt - start, 0)
    each = (tokenized.top_logprobs_num or 0) + len(tokenized.token_ids_logprob or ())
    if each * tokens <= MAX_LOGPROBS:
        return None
    found = Said(f"{each} for each of {tokens} tokens")
    return Problem("logprobs", found, f"at most {MAX_LOGPROBS} in all: ask for fewer tokens")


def _or_value_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``function`` returns; an exception that a request's shape caused is a ValueError."""
    try:
        return function(*args, **kwargs)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(unreadable(error)) from error
