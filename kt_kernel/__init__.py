"""CPU experts for stock SGLang: a drop-in for the ``kt_kernel`` that it imports.

``from kt_kernel import KTMoEWrapper`` is all that SGLang does. Importing this package stays cheap:
torch and the extension load with the first name that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_kernel.masks import generate_gpu_experts_masks
    from kt_kernel.wrapper import KTMoEWrapper

    __version__: str

__all__ = ["KTMoEWrapper", "__version__", "generate_gpu_experts_masks"]

#: Name of this package among the installed ones; pyproject.toml has its version.
DISTRIBUTION = "kt-kernel-stock-sglang"


def __getattr__(name: str) -> Any:
    if name == "KTMoEWrapper":
        from kt_kernel.wrapper import KTMoEWrapper

        return KTMoEWrapper
    if name == "generate_gpu_experts_masks":
        from kt_kernel.masks import generate_gpu_experts_masks

        return generate_gpu_experts_masks
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version(DISTRIBUTION)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
