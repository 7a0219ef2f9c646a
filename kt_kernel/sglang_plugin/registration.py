"""Whether SGLang will find this plugin at all: nothing else could tell that it did not."""

from collections.abc import Mapping
from importlib.metadata import entry_points

from kt_kernel.errors import UserError
from kt_kernel.installed import how_to_install

GROUP = "sglang.srt.plugins"
NAME = "kt_kernel"


def check_registered() -> None:
    """Raise :class:`UserError` unless the installed packages announce this plugin to SGLang.

    They do not when this package is imported from a source tree that was never installed.
    """
    if not entry_points(group=GROUP, name=NAME):
        raise UserError(
            f"SGLang would not load the {NAME} plugin: no installed package has the entry point "
            f"{NAME} in the group {GROUP}; {how_to_install()}"
        )


def with_our_plugin(environ: Mapping[str, str]) -> dict[str, str]:
    """SGLANG_PLUGINS with our name added, if it restricts SGLang to other plugins."""
    allowed = [name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",")]
    allowed = [name for name in allowed if name]
    if not allowed or NAME in allowed:
        return {}
    return {"SGLANG_PLUGINS": ",".join([*allowed, NAME])}
