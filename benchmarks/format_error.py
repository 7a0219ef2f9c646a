"""The error table of docs/weight-format.md: one expert of V3.2's shape against its packed self.

    python -m benchmarks.format_error

Error is mean|o - ref| / mean|ref| of the expert's output over 64 Gaussian tokens; with outliers,
four channels of the tokens are fifty times as large. "Per row" is the scheme with one scale for
each output row and 15 linear levels, for comparison; activations stay in float there, so its column
flatters it. The last column is the relative Frobenius error of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kt_kernel import KTMoEWrapper, _ext, packed
from kt_kernel.host.cpus import allowed_cpus

HIDDEN, INTERMEDIATE, TOKENS = 7168, 2048, 64
#: Of the tokens, in the rows "outliers".
OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 50
KINDS = (
    *("gaussian", "gaussian fp8", "student-t5", "student-t5 fp8", "laplace"),
    "gaussian, outliers",
)
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(kind: str, n: int, k: int, rng: np.random.Generator) -> torch.Tensor:
    if kind.startswith("gaussian"):
        w = rng.standard_normal((n, k))
    elif kind.startswith("student"):
        w = rng.standard_t(5, (n, k))
    else:
        w = rng.laplace(size=(n, k))
    weights = torch.from_numpy((w / np.sqrt(k)).astype(np.float32))
    return round_fp8(weights) if kind.endswith("fp8") else weights


def round_fp8(w: torch.Tensor) -> torch.Tensor:
    """Through e4m3 in 128 x 128 blocks with power-of-two scales, as V3.2 is stored."""
    n, k = w.shape
    blocks = w.reshape(n // 128, 128, k // 128, 128)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3), keepdim=True) / 448)))
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(n, k)


def expert(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = weights
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def per_row_int4(w: torch.Tensor) -> torch.Tensor:
    scale = w.abs().amax(1, keepdim=True) / 7
    return torch.round(w / scale) * scale


def through_packed(method: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def convert(w: torch.Tensor) -> torch.Tensor:
        p = _ext.quantize_projection(w.numpy(), "fp32", None, method)
        tables = _ext.int4_tables(method) if packed.METHODS[method].block_k else None
        index = p.get("table_index")
        n, k = w.shape
        found = _ext.dequantize_projection(p["codes"], p["scales"], index, tables, n, k, method)
        return torch.from_numpy(found)

    return convert


def kernel_output(weights: Weights, x: torch.Tensor, method: str) -> torch.Tensor:
    wrapper = KTMoEWrapper(
        layer_idx=0,
        num_experts=1,
        num_experts_per_tok=1,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        cpuinfer_threads=len(allowed_cpus()),
        method=packed.METHODS[method].kt_method,
    )
    gate, up, down = weights
    wrapper.load_weights_from_tensors(
        gate[None], up[None], down[None], torch.zeros(1, dtype=torch.int64), method
    )
    ids = torch.zeros(len(x), 1, dtype=torch.int32)
    return wrapper.forward(x, ids, torch.ones(len(x), 1), 0)


def main() -> None:
    print("| weights | scheme | bits/weight | error of the expert | error of the weights |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        rng = np.random.default_rng(11)
        gate, up = (draw(kind, INTERMEDIATE, HIDDEN, rng) for _ in range(2))
        down = draw(kind, HIDDEN, INTERMEDIATE, rng)
        weights = gate, up, down
        x = torch.from_numpy(rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32))
        if kind.endswith("outliers"):
            x[:, rng.choice(HIDDEN, OUTLIER_CHANNELS, replace=False)] *= OUTLIER_FACTOR
        exact = expert(weights, x)

        def row(name: str, bits: float, output: torch.Tensor, packed_weight: torch.Tensor) -> None:
            error = (output - exact).abs().mean() / exact.abs().mean()  # noqa: B023
            frobenius = (packed_weight - gate).norm() / gate.norm()  # noqa: B023
            print(f"| {kind} | {name} | {bits:.3f} | {error:.4f} | {frobenius:.4f} |", flush=True)  # noqa: B023

        rows4 = per_row_int4(gate), per_row_int4(up), per_row_int4(down)
        row("per row, 4 bit", 4.0, expert(rows4, x), rows4[0])
        for method in packed.METHODS:
            bits = packed.PackedLayout(256, HIDDEN, INTERMEDIATE, method).bits_per_weight()
            row(method, bits, kernel_output(weights, x, method), through_packed(method)(gate))


if __name__ == "__main__":
    main()
