"""One layer of V3.2's size on the card's path, against float arithmetic on its file's weights.

    python -m benchmarks.rehearsal.numerics [--methods int4 int8] [--resident N ...] [--json FILE]

Inputs come from the GPU and outputs go there, called directly and replayed by a CUDA graph. The
reference takes the weights as the file's codes and scales stand for, in float32 on the GPU: what is
left is what int8 activations cost, and rounding. Resident experts are FP8, multiplied by SGLang's
kernel while the CPUs compute the others, as SGLang does it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import markdown
from benchmarks.host_description import allowed_cpus
from benchmarks.rehearsal import packed_layers, plan
from benchmarks.rehearsal.resident_experts import ResidentExperts, start_sglang
from benchmarks.rehearsal.workspace import workspace
from deploy.launch.gpu_memory import V32_CONFIG
from kt_kernel import KTMoEWrapper, _ext, packed
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.host.machine import survey

TOKENS = (1, 16, 512, 4096)
LAYER, TOP_K = V32_CONFIG["first_k_dense_replace"], V32_CONFIG["num_experts_per_tok"]
Weights = tuple[torch.Tensor, ...]
#: x [T, H], ids and routing weights [T, k] of a call.
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def dequantised(path: Path, layout: packed.PackedLayout) -> Iterator[Weights]:
    """Gate, up [I, H] and down [H, I] of every expert in turn, float32 on the CPU."""
    header, specs = read_header(path), layout.tensors()
    tables = np.asarray(_ext.int4_tables(layout.method)) if layout.has_tables else None

    def part(name: str, expert: int, dtype: type) -> np.ndarray:
        size = specs[name].nbytes // layout.num_experts
        offset = header.tensors[name].begin + expert * size
        count = size // np.dtype(dtype).itemsize
        data: NDArray[Any] = np.fromfile(path, dtype, count, offset=offset)
        return data.reshape(specs[name].shape[1:])

    def expert(index: int) -> Weights:
        found = []
        for name in packed.PROJECTIONS:
            n, k = layout.projection_shape(name)
            blocks = part(f"{name}.table_index", index, np.uint8) if layout.has_tables else None
            codes = part(f"{name}.codes", index, np.uint8)
            scales = part(f"{name}.scales", index, np.uint16)
            weights = _ext.dequantize_projection(codes, scales, blocks, tables, n, k, layout.method)
            found.append(torch.from_numpy(weights))
        return tuple(found)

    threads = len(allowed_cpus())
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, layout.num_experts, 2 * threads):
            last = min(first + 2 * threads, layout.num_experts)
            yield from pool.map(expert, range(first, last))


def output(wrapper: KTMoEWrapper, residents: ResidentExperts | None, call: Inputs) -> torch.Tensor:
    """Of a whole layer, bf16 [T, H]: in the order of SGLang's ``KTEPWrapperMethod.apply``."""
    stream = torch.cuda.current_stream().cuda_stream
    wrapper.submit_forward(*call, stream)
    on_gpu = residents.forward(*call) if residents else None
    on_cpus = wrapper.sync_forward(call[0], stream)
    return on_cpus if on_gpu is None else on_gpu + on_cpus


def errors(folder: Path, method: str, resident: int, threads: int) -> dict[str, dict[str, float]]:
    """Tokens -> mean|o - ref| / mean|ref|, called directly, by the CPUs alone, in a CUDA graph."""
    layout = plan.v32_layout(method)
    packed_layers.write_layers(folder, layout, [LAYER])
    torch.cuda.init()  # else the card takes no part in prompts
    wrapper = packed_layers.load_layer(folder, layout, LAYER, resident, threads)
    residents = ResidentExperts(LAYER, resident) if resident else None
    torch.manual_seed(0)
    inputs, outputs, wanted = {}, {}, {}
    for tokens in TOKENS:
        x = torch.randn(tokens, layout.hidden_size, device="cuda").to(torch.bfloat16)
        scores = torch.rand(tokens, layout.num_experts, device="cuda")
        # A few tokens would hardly meet the residents, which come first.
        scores[:, :resident] += 0.5
        weights, ids = scores.topk(TOP_K)
        inputs[tokens] = call = x, ids.to(torch.int32), weights / weights.sum(1, keepdim=True)
        outputs[tokens] = {"direct": output(wrapper, residents, call).float()}
        outputs[tokens]["CPUs"] = output(wrapper.without_deferral(), residents, call).float()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = output(wrapper, residents, call)
        graph.replay()
        torch.cuda.synchronize()
        outputs[tokens]["graph"] = captured.float()
        wanted[tokens] = torch.zeros_like(x, dtype=torch.float32)
    for expert, matrices in enumerate(dequantised(folder / packed.layer_file_name(LAYER), layout)):
        if residents and expert < resident:
            matrices = residents.dequantised(expert)
        gate, up, down = (matrix.cuda() for matrix in matrices)
        for tokens, (x, ids, weights) in inputs.items():
            row, slot = (ids == expert).nonzero(as_tuple=True)
            if len(row):
                rows = x[row].float()
                y = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
                wanted[tokens].index_add_(0, row, y * weights[row, slot][:, None])
    return {
        str(tokens): {
            how: float((result - wanted[tokens]).abs().mean() / wanted[tokens].abs().mean())
            for how, result in found.items()
        }
        for tokens, found in outputs.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0 when compared, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal.numerics", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--methods", nargs="+", choices=packed.METHODS, default=["int4", "int8"])
    parser.add_argument(
        "--resident", type=int, nargs="+", default=[0, 16], help="on the GPU (0 16)"
    )
    parser.add_argument("--folder", type=Path, default=plan.TMPFS, help="for a layer of 6 to 12 GB")
    parser.add_argument("--json", type=Path, help="write the errors there, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no NVIDIA GPU: expected one", file=sys.stderr)
        return 2
    threads = survey().expert_threads(1)
    found: dict[str, dict[str, Any]] = {}
    if any(args.resident):
        start_sglang()
    titles = ["experts", "resident", *(f"{tokens} tokens" for tokens in TOKENS)]
    print("\n".join(markdown.table(titles, [])))
    for method, resident in itertools.product(args.methods, args.resident):
        with workspace(args.folder) as folder:
            measured = errors(folder, method, resident, threads)
        found.setdefault(method, {})[str(resident)] = measured
        cells = (f"{e['direct']:.4f}, {e['CPUs']:.4f}, {e['graph']:.4f}" for e in measured.values())
        print(f"| {method} | {resident} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
