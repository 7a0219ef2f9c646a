"""A bound, not a baseline: one dense int8 product of as many operations, through torch (oneDNN).

No experts, no routing, no activation, weights read once for all tokens; its result is nobody's
output, so it has no error.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from protocol import HIDDEN, INTERMEDIATE, TOP_K, Bf16, Call, Floats, Job, Unavailable, serve


class Dense:
    def __init__(self, job: Job) -> None:
        if "onednn" not in torch.backends.quantized.supported_engines:
            raise Unavailable("this torch has no oneDNN engine for quantised layers")
        warnings.filterwarnings("ignore", message=".*quantize")
        torch.set_num_threads(job.threads)
        torch.backends.quantized.engine = "onednn"
        weight = torch.randint(-127, 128, (3 * INTERMEDIATE, HIDDEN)).float()
        quantised = torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantised, None)

    def describe(self) -> dict[str, Any]:
        return {"version": torch.__version__, "runs_on": "quantized::linear", "bits": 8.0}

    def bind(self, x: Bf16, ids: NDArray[np.int64], weights: Floats) -> Call:
        rows = torch.randint(0, 256, (len(x) * TOP_K, HIDDEN)).float()
        inputs = torch.quantize_per_tensor(rows, 1.0, 128, torch.quint8)
        outputs: list[torch.Tensor] = []
        return Call(
            run=lambda: outputs.append(torch.ops.quantized.linear(inputs, self._packed, 1000.0, 0)),
            result=lambda: outputs[-1].dequantize().numpy(),
        )


if __name__ == "__main__":
    serve(Dense)
