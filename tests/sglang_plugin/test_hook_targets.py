"""Every hook's target exists, with the signature the hook counts on, in each supported SGLang."""

import ast
import inspect

import pytest

from kt_kernel.sglang_plugin.hooks import HOOKS, Hook
from tests.contract.published_wheels import PLUGIN_WHEELS, PublishedWheel
from tests.sglang_plugin.wheel_source import find, is_registered, used_of


def name_of(hook: Hook) -> str:
    return hook.target.removeprefix("sglang.srt.")


@pytest.fixture(params=PLUGIN_WHEELS, ids=str)
def wheel(request: pytest.FixtureRequest) -> PublishedWheel:
    wheel: PublishedWheel = request.param
    return wheel


@pytest.mark.parametrize("hook", [h for h in HOOKS if h.kind != "entry"], ids=name_of)
def test_function_exists_and_fits(hook: Hook, wheel: PublishedWheel) -> None:
    target = find(wheel.fetch(), hook.target)
    assert isinstance(target, ast.FunctionDef), f"{wheel} has no {hook.target}"
    # SGLang may pass any argument by position: ours must take the target's, in order.
    arguments = [argument.arg for argument in target.args.args]
    signature = inspect.signature(hook.function)
    if hook.kind in ("after", "around"):
        # The result, or the function that is wrapped.
        arguments = ["first", *arguments]
    signature.bind(*arguments)


def is_import(hook: Hook) -> bool:
    """Whether a hook takes the place of what a module imports."""
    return ".__dict__[" in hook.target


ENTRIES = [hook for hook in HOOKS if hook.kind == "entry"]


@pytest.mark.parametrize("hook", [h for h in ENTRIES if is_import(h)], ids=name_of)
def test_what_is_used_of_an_import_is_there(hook: Hook, wheel: PublishedWheel) -> None:
    module, name = hook.target.removesuffix("]").split(".__dict__[")
    used = used_of(wheel.fetch(), module, name)
    assert used, f"{wheel}: {module} does not import {name}"
    assert used <= set(vars(hook.function))


@pytest.mark.parametrize("hook", [h for h in ENTRIES if not is_import(h)], ids=name_of)
def test_dictionary_exists(hook: Hook, wheel: PublishedWheel) -> None:
    path, key = hook.target.removesuffix("]").split("[")
    target = find(wheel.fetch(), path)
    assert isinstance(target, ast.Assign), f"{wheel} has no {path}"
    assert isinstance(target.value, ast.Dict)
    # MLA on torch_native is what stock SGLang lacks; everything else we override.
    expected = not (key == "torch_native" and path.endswith("_handlers"))
    assert is_registered(wheel.fetch(), path, key) == expected


def test_an_unknown_target_is_noticed(wheel: PublishedWheel) -> None:
    assert find(wheel.fetch(), "sglang.srt.server_args.ServerArgs.no_such_method") is None
    assert find(wheel.fetch(), "sglang.srt.no_such_module.f") is None
    assert not is_registered(
        wheel.fetch(), "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS", "none"
    )


def test_each_hook_says_why() -> None:
    assert all(len(hook.reason) > 10 for hook in HOOKS)
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)
