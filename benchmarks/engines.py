"""The engines of the side-by-side, in the order of the tables."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.baselines import Baselines


@dataclass(frozen=True)
class EngineSpec:
    """One row of the tables.

    Args:
        key: its name in results and on the command line.
        label: its name in tables.
        worker: script of ``benchmarks/workers``.
        method: what the script calls the format of the weights.
        bits: 4 or 8; ours of the same class is what the row is compared with.
        package: whose version it carries, as the baselines' manifest calls it; ``""`` for ours.
        min_tokens: calls of fewer tokens say nothing about this engine.
        checked: whether its output is that of the layer.
    """

    key: str
    label: str
    worker: str
    method: str
    bits: int
    package: str = ""
    min_tokens: int = 1
    checked: bool = True

    def folder(self, baselines: Baselines) -> str:
        return str({"kt_upstream": baselines.kt_kernel, "ggml": baselines.ggml}[self.worker])


_KT, _LLAMA = "kt-kernel", "llama-cpp-python"

ENGINES = (
    EngineSpec("ours-int4", "ours INT4", "ours", "int4", 4),
    EngineSpec("ours-int4-4x8", "ours INT4, 4 x 8", "ours", "int4-4x8", 4),
    EngineSpec("kt-amxint4", "kt-kernel AMXINT4", "kt_upstream", "AMXINT4", 4, _KT),
    EngineSpec("kt-rawint4", "kt-kernel RAWINT4", "kt_upstream", "RAWINT4", 4, _KT),
    EngineSpec("ggml-q4_k", "mainline llama.cpp q4_K", "ggml", "q4_K", 4, _LLAMA),
    EngineSpec("ggml-q4_0", "mainline llama.cpp q4_0", "ggml", "q4_0", 4, _LLAMA),
    EngineSpec("ours-int8", "ours INT8", "ours", "int8", 8),
    EngineSpec("kt-amxint8", "kt-kernel AMXINT8", "kt_upstream", "AMXINT8", 8, _KT),
    EngineSpec("kt-fp8", "kt-kernel FP8", "kt_upstream", "FP8", 8, _KT),
    EngineSpec("ggml-q8_0", "mainline llama.cpp q8_0", "ggml", "q8_0", 8, _LLAMA),
    EngineSpec(
        "dense", "dense int8 product (oneDNN)", "onednn", "int8", 8, min_tokens=128, checked=False
    ),
)
