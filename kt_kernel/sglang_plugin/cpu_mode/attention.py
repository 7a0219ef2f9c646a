"""Attention on the CPU: absorbed MLA on SGLang's torch_native backend."""

from typing import Any


def absorbed_mla(attn: Any, forward_batch: Any) -> Any:
    """Attention handler: the one MLA form that works for prefill and decode alike.

    The other forms need ragged prefill kernels that torch_native does not have.
    """
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return AttnForwardMethod.MLA


def create_torch_native_backend(runner: Any) -> Any:
    """Attention backend factory: torch_native under the name ``triton``."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS["torch_native"](runner)


def support_triton(backend: str) -> bool:
    """Whether Triton kernels can run beside the attention backend of that name: not here."""
    return False
