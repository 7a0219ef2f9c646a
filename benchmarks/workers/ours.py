"""Our kernels, through the ``KTMoEWrapper`` that SGLang calls."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from protocol import (
    HIDDEN,
    INTERMEDIATE,
    PROJECTIONS,
    TOP_K,
    Bf16,
    Call,
    Floats,
    Job,
    serve,
)

# Where the package is not installed it lies beside the benchmarks; an installed one goes first.
sys.path.append(str(Path(__file__).parents[2]))
from kt_kernel import KTMoEWrapper, _ext, packed
from kt_kernel.engine import target_name
from kt_kernel.files.safetensors_header import header_bytes


class Ours:
    def __init__(self, job: Job) -> None:
        self._layout = packed.PackedLayout(job.experts, HIDDEN, INTERMEDIATE, job.method)
        folder = Path(job.sources) / job.method
        if not folder.exists():  # the first of the runs with different numbers of threads
            partial = folder.with_suffix(".partial")
            partial.mkdir()
            write_layer(partial / packed.layer_file_name(0), self._layout, job)
            partial.rename(folder)
        self._wrapper = KTMoEWrapper(
            layer_idx=0,
            num_experts=job.experts,
            num_experts_per_tok=TOP_K,
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            num_gpu_experts=0,
            cpuinfer_threads=job.threads,
            threadpool_count=1,
            weight_path=str(folder),
            method=packed.METHODS[job.method].kt_method,
        )
        self._wrapper.load_weights(torch.arange(job.experts))

    def describe(self) -> dict[str, Any]:
        return {
            "version": "this checkout",
            "runs_on": target_name(),
            "bits": self._layout.bits_per_weight(),
        }

    def bind(self, x: Bf16, ids: NDArray[np.int64], weights: Floats) -> Call:
        hidden = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        chosen, scale = torch.from_numpy(ids).int(), torch.from_numpy(weights)
        outputs: list[torch.Tensor] = []
        return Call(
            run=lambda: outputs.append(self._wrapper.forward(hidden, chosen, scale, 0)),
            result=lambda: outputs[-1].float().numpy(),
        )


def write_layer(path: Path, layout: packed.PackedLayout, job: Job) -> None:
    """A layer file whose experts are packed copies of the sources."""

    def pack(projection: str, index: int) -> dict[str, NDArray[Any]]:
        weight = np.ascontiguousarray(job.source(projection)[index])
        return _ext.quantize_projection(weight, "bf16", None, layout.method)

    wanted = [(projection, index) for projection in PROJECTIONS for index in range(job.num_sources)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = dict(zip(wanted, pool.map(lambda key: pack(*key), wanted), strict=True))
    with path.open("wb") as file:
        file.write(header_bytes(layout.tensors(), layout.metadata(0)))
        for name in layout.tensors():
            if name == "tables":
                file.write(_ext.int4_tables(layout.method).tobytes())
                continue
            projection, part = name.split(".")
            for expert in range(job.experts):
                file.write(parts[projection, expert % job.num_sources][part].tobytes())


if __name__ == "__main__":
    serve(Ours)
