"""The check that hooks took, on a small module in place of SGLang."""

import functools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin.hooks import HOOKS, Hook, active_hooks, check, is_in_place, set_entries


@pytest.fixture
def target_module() -> Iterator[types.ModuleType]:
    module = types.ModuleType("hook_target")
    vars(module).update(function=lambda: 1, TABLE={"a": 1}, not_a_table=3)
    sys.modules["hook_target"] = module
    yield module
    del sys.modules["hook_target"]


def ours(*args: Any) -> None: ...


def make_hook(target: str, kind: Any = "before") -> Hook:
    return Hook(target, kind, ours, "for the test", "always")


def wrapped_as_sglang_does(original: Any, hook: Any) -> Any:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return original(*args, **kwargs)

    wrapper.__wrapped__ = original
    return wrapper


def test_untouched_function_is_not_in_place(target_module: Any) -> None:
    assert not is_in_place(make_hook("hook_target.function"))


def test_hook_is_found_under_another_plugins_hook(target_module: Any) -> None:
    target_module.function = wrapped_as_sglang_does(target_module.function, ours)
    target_module.function = wrapped_as_sglang_does(target_module.function, lambda: None)
    assert is_in_place(make_hook("hook_target.function"))


def test_replaced_after_us_is_not_in_place(target_module: Any) -> None:
    target_module.function = wrapped_as_sglang_does(target_module.function, ours)
    target_module.function = lambda: 2
    assert not is_in_place(make_hook("hook_target.function"))


@pytest.mark.parametrize("target", ["hook_target.gone", "no_such_module.function"])
def test_missing_target_fails_the_check_by_name(target_module: Any, target: str) -> None:
    with pytest.raises(UserError, match=rf"{target} \(before\)"):
        check([make_hook(target)])


def test_a_module_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_target.py").write_text("import a_library_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    cause = "broken_target cannot be imported: No module named 'a_library_that_is_missing'"
    with pytest.raises(UserError, match=cause) as caught:
        check([make_hook("broken_target.Class.method")])
    assert "tested with" not in str(caught.value)  # SGLang's version is not why


def test_entries_are_set_and_checked(target_module: Any) -> None:
    hook = make_hook("hook_target.TABLE[b]", "entry")
    with pytest.raises(UserError, match=r"TABLE\[b\]"):
        check([hook])
    set_entries([hook])
    check([hook])
    assert {"a": 1, "b": ours} == target_module.TABLE


@pytest.mark.parametrize("path", ["hook_target.GONE", "no_such_module.TABLE"])
def test_missing_dictionary_is_named(target_module: Any, path: str) -> None:
    with pytest.raises(UserError, match=f"has no {path}"):
        set_entries([make_hook(f"{path}[b]", "entry")])


def test_dictionary_of_another_type_is_named(target_module: Any) -> None:
    with pytest.raises(UserError, match=r"hook_target.not_a_table .* int"):
        set_entries([make_hook("hook_target.not_a_table[b]", "entry")])


def test_with_a_gpu_nothing_of_cpu_mode_is_active() -> None:
    active = active_hooks(HOOKS, on_cpu=False)
    assert [hook.target.rsplit(".", 1)[1] for hook in active] == [
        "create_moe_runner",
        "check_server_args",
        "load_model",
        "run_event_loop",
        "init_distributed_environment",
        "_setup_and_run_http_server",
        "_wait_and_warmup",
        "sigterm_handler",
        "auto_create_handle_loop",
        "set_global_state",
        "__dict__[requests]",
        "create_error_response",
        "create_error_response",
        "_error_response",
        "normalize_batch_and_arguments",
        "normalize_batch_and_arguments",
        "_create_tokenized_object",
        "process_input_requests",
        "run_batch",
        "fill_vocab_mask",
        "accept_token",
        "__init__",
        "__dict__[re]",
        "_check_str_based_finish",
        "has_tool_call",
        "detect_and_parse",
        "parse_streaming_increment",
    ]
    assert not any("cpu_mode" in hook.function.__module__ for hook in active)


def test_without_a_gpu_every_hook_is_active() -> None:
    assert active_hooks(HOOKS, on_cpu=True) == HOOKS
