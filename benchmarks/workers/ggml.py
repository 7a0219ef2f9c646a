"""llama.cpp's kernels: ggml's graph of a MoE layer, from a library built over its sources."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from protocol import (
    EXPERT_WEIGHTS,
    HIDDEN,
    INTERMEDIATE,
    PROJECTIONS,
    TOP_K,
    Bf16,
    Call,
    Floats,
    Job,
    Unavailable,
    from_bf16,
    serve,
)


class Ggml:
    def __init__(self, job: Job) -> None:
        self._library = _open(Path(job.baseline))
        self._layer = self._library.layer_new(
            os.fsencode(job.baseline), job.threads, HIDDEN, INTERMEDIATE, job.experts, TOP_K,
            job.method.encode(),
        )  # fmt: skip
        if not self._layer:
            raise Unavailable(self._library.layer_error().decode())
        self._bytes = 0
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for index, projection in enumerate(PROJECTIONS):
                tasks = [(job, projection, source) for source in range(job.num_sources)]
                parts = list(pool.map(self._quantise, *zip(*tasks, strict=True)))
                everyone = np.stack([parts[e % len(parts)] for e in range(job.experts)])
                self._bytes += parts[0].nbytes
                self._library.layer_set(self._layer, index, everyone.ctypes.data, everyone.nbytes)

    def _quantise(self, job: Job, projection: str, index: int) -> NDArray[np.uint8]:
        weights = np.ascontiguousarray(job.source_floats(projection, index))
        n, k = weights.shape
        codes = np.empty(self._library.layer_row_bytes(self._layer, n, k), np.uint8)
        self._library.layer_quantize(self._layer, weights.ctypes.data, codes.ctypes.data, n, k)
        return codes

    def describe(self) -> dict[str, Any]:
        runs_on = self._library.layer_description(self._layer).decode()
        return {"runs_on": runs_on, "bits": 8 * self._bytes / EXPERT_WEIGHTS}

    def bind(self, x: Bf16, ids: NDArray[np.int64], weights: Floats) -> Call:
        hidden = from_bf16(x)
        chosen, scale = ids.astype(np.int32), np.ascontiguousarray(weights)
        output = np.empty_like(hidden)

        def run() -> None:
            arrays = (hidden, chosen, scale, output)
            if self._library.layer_forward(self._layer, len(x), *(a.ctypes.data for a in arrays)):
                raise RuntimeError(self._library.layer_error().decode())

        return Call(run=run, result=lambda: output)


def _open(folder: Path) -> Any:
    path = folder / "libggml_layer.so"
    if not path.is_file():
        raise Unavailable(f"{path} is missing: prepare the baselines again")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"it does not load: {error}") from None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        "layer_error": (ctypes.c_char_p, []),
        "layer_new": (
            pointer,
            [ctypes.c_char_p, number, size, size, size, size, ctypes.c_char_p],
        ),
        "layer_description": (ctypes.c_char_p, [pointer]),
        "layer_row_bytes": (size, [pointer, size, size]),
        "layer_quantize": (None, [pointer, pointer, pointer, size, size]),
        "layer_set": (None, [pointer, number, pointer, size]),
        "layer_forward": (number, [pointer, size, pointer, pointer, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


if __name__ == "__main__":
    serve(Ggml)
