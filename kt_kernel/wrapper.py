"""``KTMoEWrapper``: one MoE layer's routed experts on the CPU, as SGLang calls them.

The calls are those of stock SGLang 0.5.6 to 0.5.23 (``num_gpu_experts``) and of the upstream fork
(``gpu_experts_mask``); ``tests/contract`` binds the published ones to these signatures.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel import _ext, packed
from kt_kernel.arguments import check_tensor, whole
from kt_kernel.calls import ACTIVATION_DTYPES, LEFT, Batch, Call
from kt_kernel.engine import shared_engine
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill.layer import LayerOnCard
from kt_kernel.gpu_prefill.start import on_card
from kt_kernel.layer_calls import LayerCalls
from kt_kernel.layer_weights import LayerWeights
from kt_kernel.placement.counts import Model
from kt_kernel.placement.metrics import Pairs
from kt_kernel.stream import check_earlier_calls, prepare

_MAX_LAYER = 2**31 - 1  # an int of the extension's


class KTMoEWrapper:
    """Routed experts of one MoE layer, computed on the CPU.

    Args:
        layer_idx: index of the decoder layer; names the weight file.
        num_experts: routed experts E of the layer.
        num_experts_per_tok: top-k.
        hidden_size: H, a multiple of 64.
        moe_intermediate_size: I of one expert, a multiple of 64.
        num_gpu_experts: experts ``0 .. num_gpu_experts - 1`` run on the GPU (stock SGLang).
        gpu_experts_mask: bool [E], true for experts on the GPU (the fork); not with
            ``num_gpu_experts``. May be changed in place between calls.
        cpuinfer_threads: worker threads, at most the CPUs this process may use.
        threadpool_count: slices of the layer and groups of threads, one for each NUMA node. Decides
            the last bits of the result; the number of threads does not.
        weight_path: folder written by ``python -m convert``; not needed for
            ``load_weights_from_tensors``.
        chunked_prefill_size: the largest number of tokens SGLang will submit; larger calls work.
        method: ``"AMXINT4"`` or ``"AMXINT8"``: the format of the weights; which of the two int4
            formats, the files say. The instructions used are the best this CPU has.
        max_deferred_experts_per_token: of a token's top-k, that many of the smallest weights go
            into the next MoE layer's output instead of this one's, but for experts that the batch
            needs at once for another token: an approximation, which lets the CPU work while the
            GPU is at the next layer's attention. None and 0 defer none, which SGLang passes to the
            last layer.
        numa_nodes, cpu_save: accepted for the fork and not needed.
        mode: ``"inference"``.
        swiglu_limit, swiglu_alpha: 0.0; V3.2 has neither.

    Raises:
        UserError: an argument out of range, or weights of another layer, model or method.
    """

    _capture_batch_sizes: tuple[int, ...] = ()
    _deferred = LEFT

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_gpu_experts: int | None = None,
        cpuinfer_threads: int = 1,
        threadpool_count: int = 1,
        weight_path: str | None = None,
        chunked_prefill_size: int | None = None,
        method: str = "AMXINT4",
        max_deferred_experts_per_token: int | None = None,
        gpu_experts_mask: torch.Tensor | None = None,
        numa_nodes: Sequence[int] | None = None,
        cpu_save: bool = False,
        mode: str = "inference",
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
    ) -> None:
        if method not in list(packed.KT_METHODS):  # by comparing: not everything has a hash
            raise UserError(
                f"method (--kt-method) is {method!r}: expected one of "
                f"{', '.join(packed.KT_METHODS)}"
            )
        if mode != "inference":
            raise UserError(f"mode is {mode!r}: expected 'inference', the only one there is")
        if swiglu_limit or swiglu_alpha:
            raise UserError(
                f"swiglu_limit {swiglu_limit} and swiglu_alpha {swiglu_alpha}: expected 0, a "
                "clamped or scaled SwiGLU is not supported"
            )
        self.layer_idx = whole("layer_idx", layer_idx, 0, _MAX_LAYER)
        self.method = method
        self.weight_path = weight_path
        layout = packed.PackedLayout(
            whole("num_experts", num_experts),
            whole("hidden_size", hidden_size),
            whole("moe_intermediate_size", moe_intermediate_size),
            packed.KT_METHODS[method],
        )
        num_experts, self.hidden_size = layout.num_experts, layout.hidden_size
        self.top_k = whole("num_experts_per_tok", num_experts_per_tok, 1, num_experts)
        self._mask = _ext.ExpertMask(num_experts)
        self.gpu_experts_mask = _gpu_mask(num_experts, num_gpu_experts, gpu_experts_mask)
        deferred = whole(
            "max_deferred_experts_per_token (--kt-max-deferred-experts-per-token)",
            max_deferred_experts_per_token or 0,
            0,
        )
        self._pools = threadpool_count
        self._process = os.getpid()
        self._weights = LayerWeights(
            self.layer_idx,
            self.top_k,
            layout,
            shared_engine(cpuinfer_threads, threadpool_count),
            self._mask,
            # The fork moves experts between CPU and GPU by writing into the mask; stock SGLang
            # never does, so there the GPU's experts need no memory here.
            mask_may_change=gpu_experts_mask is not None,
        )
        self._calls = LayerCalls(self._weights, min(deferred, self.top_k))
        self._pending: Call | None = None

    @property
    def gpu_experts_mask(self) -> torch.Tensor:
        """bool [E] on the CPU, true for experts that the GPU runs; may be changed between calls.

        The memory is the extension's, and goes with the last layer or graph that reads it.

        Raises:
            UserError: another shape or dtype is assigned.
        """
        return torch.from_numpy(self._mask.array)

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: torch.Tensor) -> None:
        held = self.gpu_experts_mask
        check_tensor("gpu_experts_mask", mask, tuple(held.shape), (torch.bool,))
        held.copy_(mask)

    # ---- what the self-test asks -----------------------------------------------------------------

    @property
    def target(self) -> str:
        """Name of the target that runs."""
        return self._weights.engine.target

    @property
    def on_card(self) -> LayerOnCard | None:
        """What divides calls of many tokens between a GPU and the CPUs; None where nothing does."""
        return self._calls.on_card

    def cpu_slots(self) -> list[int]:
        """Ids of the experts that run here; empty before ``load_weights``."""
        return self._weights.cpu_slots()

    def without_deferral(self) -> KTMoEWrapper:
        """The same layer, whose calls run all experts at once."""
        other = copy.copy(self)
        other._calls = LayerCalls(other._weights, 0)
        return other

    def plain_copy(self, slots: Sequence[int]) -> KTMoEWrapper:
        """Some of the layer's experts, read from its file again, on the plain target.

        Raises:
            UserError: the file is gone or damaged.
        """
        other = copy.copy(self)
        other._weights = self._weights.plain_copy(self.weight_path, slots, self._pools)
        return other.without_deferral()

    # ---- what is counted -------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """What the counts belong to, once the weights are loaded."""
        return Model(self._weights.fingerprint, len(self._mask.array))

    def expert_counts(self) -> NDArray[np.int64]:
        """[E] how often calls have named each expert of the checkpoint, on the GPU or here."""
        return self._weights.expert_counts()

    def routed_pairs(self) -> Pairs:
        """How many (token, expert) pairs calls have named, by where they were computed."""
        return self._weights.routed_pairs()

    # ---- weights ---------------------------------------------------------------------------------

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor) -> None:
        """Read the layer's packed file from ``weight_path``.

        Args:
            physical_to_logical_map_cpu: int64 [E]; slot ``p`` gets the checkpoint's expert
                ``map[p]``.

        Raises:
            UserError: no file, or one of another layer, model or method, or a damaged one.
        """
        self._calls.leave_card()
        path = self._weights.load(self.weight_path, physical_to_logical_map_cpu)
        last = packed.is_last_layer(path)
        if last:
            # No layer comes after it to whose output its experts could be added. SGLang 0.5.16 does
            # not find out how many layers there are, and asks the last one to defer, too.
            self._calls.num_deferred = 0
        prepare()
        self._calls.on_card = on_card(self._weights, self.without_deferral().forward, last)

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor,
        quant_method: str | None = None,
    ) -> None:
        """Quantise the layer from unquantised tensors; ``weight_path`` is not used.

        Args:
            gate_proj, up_proj: bf16 (or fp16, fp32) [E, I, H].
            down_proj: the same dtype, [E, H, I].
            physical_to_logical_map_cpu: int64 [E], as for ``load_weights``.
            quant_method: ``"int4-4x8"`` for tables of 4 x 8 weights; None is the method's own.

        Raises:
            UserError: a wrong shape or dtype, or a weight that is not finite.
        """
        self._calls.leave_card()
        self._weights.load_from_tensors(
            (gate_proj, up_proj, down_proj), physical_to_logical_map_cpu, quant_method
        )
        prepare()

    # ---- the call --------------------------------------------------------------------------------

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int = 0,
    ) -> None:
        """Start the CPU experts for a batch and return without waiting for them.

        The inputs have been read when this returns (on CUDA: are copied on ``cuda_stream``), since
        SGLang overwrites them.

        Args:
            hidden_states: bf16 or fp32 [T, H].
            topk_ids: int32 or int64 [T, k]; -1 is padding, ids of GPU experts are skipped.
            topk_weights: fp32 [T, k].
            cuda_stream: raw handle of the current CUDA stream; 0 on the CPU.

        Raises:
            UserError: a wrong shape or dtype, an id out of range, a call that is still pending, or
                one in a process that was forked since the layer was made.
            RuntimeError: a call on a CUDA stream has failed before, of whatever layer.
        """
        if self._pending is not None:
            raise UserError(
                f"layer {self.layer_idx}: submit_forward without sync_forward before it"
            )
        if os.getpid() != self._process:  # a call would wait forever
            raise UserError(
                f"layer {self.layer_idx}: this process was forked, and threads do not come along: "
                "make the layer in the process that calls it"
            )
        check_earlier_calls()
        tokens = next(iter(getattr(hidden_states, "shape", ())), 0)
        check_tensor(
            "hidden_states",
            hidden_states,
            (tokens, self.hidden_size),
            tuple(ACTIVATION_DTYPES),
        )
        routing = (tokens, self.top_k)
        check_tensor("topk_ids", topk_ids, routing, (torch.int32, torch.int64))
        check_tensor("topk_weights", topk_weights, routing, (torch.float32,))
        if not hidden_states.device == topk_ids.device == topk_weights.device:
            raise UserError(
                f"hidden_states is on {hidden_states.device}, topk_ids on {topk_ids.device} and "
                f"topk_weights on {topk_weights.device}: expected one device"
            )
        self._pending = self._calls.start(Batch(hidden_states, topk_ids, topk_weights))

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: int = 0) -> torch.Tensor:
        """Wait for the call and return its result.

        Args:
            hidden_states: not used; its contents may have changed.
            cuda_stream: raw handle of the current CUDA stream; 0 on the CPU.

        Returns:
            [T, H] in the dtype and on the device of the submitted hidden states: the sum over the
            CPU's experts of routing weight times expert, ``routed_scaling_factor`` not applied.
            With deferral, less the experts deferred here, plus those that the layer before
            deferred.

        Raises:
            UserError: nothing was submitted, or the layer before deferred experts of another batch.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            raise UserError(f"layer {self.layer_idx}: sync_forward without submit_forward")
        return pending.result()

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int = 0,
    ) -> torch.Tensor:
        """``submit_forward`` and ``sync_forward`` in one."""
        self.submit_forward(hidden_states, topk_ids, topk_weights, cuda_stream)
        return self.sync_forward(hidden_states, cuda_stream)

    # ---- statics that SGLang and the fork call ---------------------------------------------------

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """Remember the decode batch sizes that SGLang will capture CUDA graphs for."""
        KTMoEWrapper._capture_batch_sizes = tuple(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """The sizes given to ``set_capture_batch_sizes``."""
        return list(KTMoEWrapper._capture_batch_sizes)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Forget the capture sizes; buffers belong to the engine and are reused."""
        KTMoEWrapper._capture_batch_sizes = ()


def _gpu_mask(
    num_experts: int, num_gpu_experts: int | None, mask: torch.Tensor | None
) -> torch.Tensor:
    if mask is not None:
        if num_gpu_experts:
            raise UserError("both num_gpu_experts and gpu_experts_mask are given: expected one")
        return mask
    count = 0 if num_gpu_experts is None else num_gpu_experts
    count = whole("num_gpu_experts (--kt-num-gpu-experts)", count, 0, num_experts)
    # SGLang makes its layers under torch.device("cuda").
    return torch.arange(num_experts, device="cpu") < count
