"""A layer's first experts on the GPU, as SGLang holds and multiplies them: FP8 in blocks.

The product is SGLang's own kernel, called as its ``KTEPWrapperMethod`` does: the ids of the CPUs'
experts are -1.
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.rehearsal.checkpoint import Values
from benchmarks.rehearsal.sizes import with_moe_layers
from convert.source.experts import parse_expert_name
from examples.tiny.tensors import TensorSpec, tensor_specs
from kt_kernel.host.addresses import free_port

#: Rows and columns that share a scale.
BLOCK = 128


class ResidentExperts:
    """The first experts of a layer, with the weights that ``make rehearsal`` gives them.

    Args:
        layer: decoder layer, the first with experts or one after it.
        count: of experts.
    """

    def __init__(self, layer: int, count: int) -> None:
        self.count = count
        self._values = Values()
        sizes = with_moe_layers(1)
        specs = (
            spec for spec in tensor_specs(sizes) if f"layers.{layer}.mlp.experts." in spec.name
        )
        held = itertools.takewhile(lambda spec: _expert(spec) < count, specs)
        self._matrices = {
            (_expert(spec), spec.name.split(".")[-2]): self._on_card(spec) for spec in held
        }
        gate_up = [
            [self._matrices[e, name] for name in ("gate_proj", "up_proj")] for e in range(count)
        ]
        down = [self._matrices[e, "down_proj"] for e in range(count)]
        # As SGLang lays them out: [E, 2 I, H] and [E, H, I], scales alike.
        self._w13, self._s13 = (
            torch.stack([torch.cat([gate[i], up[i]]) for gate, up in gate_up]) for i in (0, 1)
        )
        self._w2, self._s2 = (torch.stack([matrix[i] for matrix in down]) for i in (0, 1))

    def _on_card(self, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.from_numpy(self._values.codes(spec).copy()).reshape(spec.shape)
        scales = torch.from_numpy(self._values.scales(spec)).reshape(spec.scale_shape)
        return codes.view(torch.float8_e4m3fn).cuda(), scales.cuda()

    def dequantised(self, expert: int) -> tuple[torch.Tensor, ...]:
        """Gate, up [I, H] and down [H, I] of an expert, float32 on the GPU."""
        found = []
        for name in ("gate_proj", "up_proj", "down_proj"):
            codes, scales = self._matrices[expert, name]
            wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            rows, columns = codes.shape
            found.append(codes.float() * wide[:rows, :columns])
        return tuple(found)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Their part of a layer's output, bf16 [T, H]; experts from ``count`` on are left out."""
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        here = ids.masked_fill(ids >= self.count, -1)
        config = MoeRunnerConfig(num_experts=256, num_local_experts=self.count, inplace=False)
        found: torch.Tensor = fused_experts(
            x,
            self._w13,
            self._w2,
            StandardTopKOutput(weights, here, None),
            config,
            use_fp8_w8a8=True,
            w1_scale=self._s13,
            w2_scale=self._s2,
            block_shape=[BLOCK, BLOCK],
        )
        return found


def _expert(spec: TensorSpec) -> int:
    expert = parse_expert_name(spec.name)
    assert expert is not None
    return expert[1]


def start_sglang() -> None:
    """What its kernels ask the process for: the arguments of a server, and a group of one GPU."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_context
    from sglang.srt.server_args import ServerArgs

    get_context().set_server_args(ServerArgs(model_path="dummy"))
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{free_port()}",
        backend="gloo",
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
