"""SGLang plugin: stock SGLang with kt_kernel's experts, with and without a GPU.

SGLang calls :func:`register` in every process it starts (entry point group
``sglang.srt.plugins``). The launcher calls :func:`check_registered` and
:func:`launch_environment` before it starts SGLang. Importing this package imports
neither torch nor SGLang.
"""

from kt_kernel.sglang_plugin.device import detect_device, launch_environment
from kt_kernel.sglang_plugin.registration import check_registered

__all__ = ["check_registered", "detect_device", "launch_environment", "register"]


def register() -> None:
    """Register our hooks with SGLang; end the process when that is impossible.

    SGLang logs and swallows any ``Exception`` a plugin raises and then serves
    without it, so every failure here ends in ``SystemExit`` (status 2).
    """
    from kt_kernel.sglang_plugin.refusal import refusing_to_serve

    with refusing_to_serve("could not register the kt_kernel plugin"):
        from kt_kernel.errors import UserError
        from kt_kernel.host.limits import home_problem

        # Before SGLang imports libraries that end without one, after a screen of tracebacks.
        if problem := home_problem():
            raise UserError(f"no home directory: {problem}: set HOME to one that can be written")
        from kt_kernel.sglang_plugin import ending, hooks

        ending.prepare_end()
        hooks.install()
