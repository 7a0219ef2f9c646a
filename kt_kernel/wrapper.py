"""``KTMoEWrapper``: one MoE layer's routed experts on the CPU, as SGLang calls them.

The calls are those of stock SGLang 0.5.6 to 0.5.23 (``num_gpu_experts``) and of the upstream fork
(``gpu_experts_mask``); ``tests/contract`` binds the published ones to these signatures.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kt_kernel import _ext, packed
from kt_kernel.arguments import check_tensor, whole
from kt_kernel.calls import (
    LEFT,
    C,
    CapturedCall,
    CudaCall,
    Deferred,
    OnStream,
    Pending,
    Queued,
    contiguous,
    copy_from_cuda,
    current_stream,
    split_lightest,
)
from kt_kernel.engine import shared_engine
from kt_kernel.errors import UserError
from kt_kernel.loading import load_progress
from kt_kernel.stream import check_earlier_calls, stream_context

logger = logging.getLogger(__name__)

_ACTIVATION_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_SOURCE_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_MAX_LAYER = 2**31 - 1  # an int of the extension's

#: The target that defines what the others compute, bit by bit.
PLAIN_TARGET = "scalar"


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
            into the next MoE layer's output instead of this one's: an approximation, which lets the
            CPU work while the GPU is at the next layer's attention. None and 0 defer none, which
            SGLang passes to the last layer.
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
        self._layout = packed.PackedLayout(
            whole("num_experts", num_experts),
            whole("hidden_size", hidden_size),
            whole("moe_intermediate_size", moe_intermediate_size),
            packed.KT_METHODS[method],
        )
        num_experts, self.hidden_size = self._layout.num_experts, self._layout.hidden_size
        self.top_k = whole("num_experts_per_tok", num_experts_per_tok, 1, num_experts)
        self._mask = _ext.ExpertMask(num_experts)
        self.gpu_experts_mask = _gpu_mask(num_experts, num_gpu_experts, gpu_experts_mask)
        # The fork moves experts between CPU and GPU by writing into the mask; stock SGLang never
        # does, so there the GPU's experts need no memory here.
        self._mask_may_change = gpu_experts_mask is not None
        deferred = whole(
            "max_deferred_experts_per_token (--kt-max-deferred-experts-per-token)",
            max_deferred_experts_per_token or 0,
            0,
        )
        self._num_deferred = min(deferred, self.top_k)
        self._engine = shared_engine(cpuinfer_threads, threadpool_count)
        self._process = os.getpid()
        self._pools = threadpool_count
        self._loaded: list[int] = []  # expert of the file in each slot, -1 for none
        self._layer = self._new_layer()
        self._pending: Pending | CudaCall | CapturedCall | None = None
        #: Calls in CUDA graphs: of the experts of now, and of those deferred.
        self._on_stream: tuple[_ext.StreamLayer, _ext.StreamLayer] | None = None

    def _new_layer(self) -> _ext.Layer:
        layout = self._layout
        return _ext.Layer(
            self._engine,
            layout.num_experts,
            self.top_k,
            layout.hidden_size,
            layout.intermediate_size,
            layout.method,
            self._mask,
        )

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
        return self._engine.target

    def cpu_slots(self) -> list[int]:
        """Ids of the experts that run here; empty before ``load_weights``."""
        mask = self.gpu_experts_mask.tolist()
        return [slot for slot, expert in enumerate(self._loaded) if expert >= 0 and not mask[slot]]

    def without_deferral(self) -> KTMoEWrapper:
        """The same layer, whose calls run all experts at once."""
        other = copy.copy(self)
        other._num_deferred = 0
        return other

    def plain_copy(self, slots: Sequence[int]) -> KTMoEWrapper:
        """Some of the layer's experts, read from its file again, on the plain target.

        Raises:
            UserError: the file is gone or damaged.
        """
        target = self.target if self.target == "reference" else PLAIN_TARGET
        other = self.without_deferral()
        other._engine = _ext.Engine(self._engine.cpus, self._pools, target)
        other._layer = other._new_layer()
        other._on_stream = None
        other._read_file([e if slot in slots else -1 for slot, e in enumerate(self._loaded)])
        return other

    def _use_method(self, quant_method: str) -> None:
        """Hold weights of this method, if ``--kt-method`` stands for it too."""
        served_as = packed.SERVED_AS.get(quant_method)
        if quant_method != self._layout.method and served_as == self.method:
            self._layout = dataclasses.replace(self._layout, method=quant_method)
            self._layer = self._new_layer()

    # ---- weights ---------------------------------------------------------------------------------

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor) -> None:
        """Read the layer's packed file from ``weight_path``.

        Args:
            physical_to_logical_map_cpu: int64 [E]; slot ``p`` gets the checkpoint's expert
                ``map[p]``.

        Raises:
            UserError: no file, or one of another layer, model or method, or a damaged one.
        """
        sources = self._sources(physical_to_logical_map_cpu)
        started = time.monotonic()
        path = self._read_file(sources)
        self._loaded = sources
        if packed.is_last_layer(path):
            # No layer comes after it to whose output its experts could be added. SGLang 0.5.16 does
            # not find out how many layers there are, and asks the last one to defer, too.
            self._num_deferred = 0
        line = load_progress(path.parent).line(
            self.layer_idx, self._layer.weight_bytes, started, time.monotonic()
        )
        logger.info("kt_kernel: %s, %d experts on the CPU", line, sum(s >= 0 for s in sources))

    def _read_file(self, sources: list[int]) -> Path:
        """Fill the slots with these experts of the layer's file, -1 for none; its path."""
        if self.weight_path is None:
            raise UserError("weight_path is not set: pass --kt-weight-path")
        path = Path(self.weight_path) / packed.layer_file_name(self.layer_idx)
        if not path.parent.is_dir():
            raise UserError(
                f"weight path {path.parent} does not exist: run python -m convert first"
            )
        header = packed.read_header(path)
        self._use_method(header.metadata.get("method", ""))
        packed.check_layer_header(header, self._layout, self.layer_idx)
        tables = None
        if "tables" in header.tensors:
            entry = header.tensors["tables"]
            shape = (packed.NUM_TABLES, packed.TABLE_LEVELS)
            try:
                tables = np.fromfile(path, np.int8, entry.end - entry.begin, offset=entry.begin)
                tables = tables.reshape(shape)
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read the tables of {path}: {error}") from None

        def offset(name: str) -> int:
            return header.tensors[name].begin if name in header.tensors else 0

        offsets = [
            [offset(f"{name}.{part}") for part in ("codes", "table_index", "scales")]
            for name in packed.PROJECTIONS
        ]
        try:
            # As bytes: a name need not be Unicode, what the extension says of it has to be.
            self._layer.load_file(os.fsencode(path), offsets, tables, sources)
        except UnicodeDecodeError as error:
            reason = error.object.decode(errors="backslashreplace")
            raise UserError(f"layer {self.layer_idx}: {reason}") from None
        except RuntimeError as error:
            # Some Pythons leave out what is no text.
            reason = str(error) or "its file cannot be read"
            raise UserError(f"layer {self.layer_idx}: {reason}") from None
        return path

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
        if quant_method is not None:
            if packed.SERVED_AS.get(quant_method) != self.method:
                raise UserError(
                    f"quant_method is {quant_method!r}, which {self.method} does not stand for"
                )
            self._use_method(quant_method)
        tensors = (gate_proj, up_proj, down_proj)
        dtype = getattr(gate_proj, "dtype", None)
        if dtype not in _SOURCE_DTYPES:
            raise UserError(f"gate_proj is {dtype}: expected bfloat16, float16 or float32")
        for name, tensor in zip(packed.PROJECTIONS, tensors, strict=True):
            shape = (self._layout.num_experts, *self._layout.projection_shape(name))
            check_tensor(f"{name}_proj", tensor, shape, (dtype,))
        bits = dtype if dtype == torch.float32 else torch.uint16
        arrays = [t.detach().to("cpu").contiguous().view(bits).numpy() for t in tensors]
        sources = self._sources(physical_to_logical_map_cpu)
        try:
            self._layer.load_matrices(arrays, _SOURCE_DTYPES[dtype], sources)
        except ValueError as error:
            raise UserError(f"layer {self.layer_idx}: {error}") from None

    def _sources(self, physical_to_logical: torch.Tensor) -> list[int]:
        """Expert of the file for each slot, -1 for a slot that never runs on the CPU."""
        count = self._layout.num_experts
        integers = (torch.int64, torch.int32)
        check_tensor("physical_to_logical_map", physical_to_logical, (count,), integers)
        sources: list[int] = physical_to_logical.tolist()
        if not all(0 <= s < count for s in sources):
            raise UserError(
                f"physical_to_logical_map has entries in [{min(sources)}, {max(sources)}]: "
                f"expected [0, {count - 1}]"
            )
        if self._mask_may_change:
            return sources
        return [-1 if gpu else s for s, gpu in zip(sources, self.gpu_experts_mask, strict=True)]

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
        if os.getpid() != self._process:  # a call would wait for ever
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
            tuple(_ACTIVATION_DTYPES),
        )
        routing = (tokens, self.top_k)
        check_tensor("topk_ids", topk_ids, routing, (torch.int32, torch.int64))
        check_tensor("topk_weights", topk_weights, routing, (torch.float32,))
        if not hidden_states.device == topk_ids.device == topk_weights.device:
            raise UserError(
                f"hidden_states is on {hidden_states.device}, topk_ids on {topk_ids.device} and "
                f"topk_weights on {topk_weights.device}: expected one device"
            )
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._pending = self._capture(hidden_states, topk_ids, topk_weights)
        elif hidden_states.is_cuda:
            self._pending = copy_from_cuda(hidden_states, topk_ids, topk_weights)
        else:
            self._pending = self._submit(hidden_states, topk_ids, topk_weights)

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: int = 0) -> torch.Tensor:
        """Wait for the call and return its result.

        Args:
            hidden_states: only its device is used; its contents may have changed.
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
        if isinstance(pending, CudaCall):
            pending.copied.synchronize()
            pending = self._submit(pending.x, pending.ids, pending.weights)
            return pending.result().to(hidden_states.device)
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

    def _submit(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Pending:
        x, ids, weights = contiguous(hidden_states, topk_ids, topk_weights)
        if x.requires_grad or weights.requires_grad:
            x, weights = x.detach(), weights.detach()
        before = self._take_deferred(x, Queued)
        if not self._num_deferred:
            return Pending(self._queue(x, ids, weights), before)
        ids, later = split_lightest(ids, weights, self._num_deferred)
        now = self._queue(x, ids, weights)
        LEFT.swap(Deferred(self.layer_idx, self._queue(x, later, weights)))
        return Pending(now, before)

    def _queue(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Queued:
        wide = x.dtype == torch.float32
        rows = x.numpy() if wide else x.view(torch.uint16).numpy()
        memory = self._engine.take_like(rows)
        try:
            job = self._layer.submit(rows, ids.numpy(), weights.numpy(), memory)
        except ValueError as error:
            raise UserError(f"layer {self.layer_idx}: {error}") from None
        output = torch.from_numpy(memory)
        return Queued(job, output if wide else output.view(torch.bfloat16))

    def _take_deferred(self, x: torch.Tensor, kind: type[C]) -> C | None:
        """What the MoE layer before has left for this one's output, in a pass of this kind."""
        deferred = LEFT.swap(None)
        return None if deferred is None else deferred.into(self.layer_idx, x.shape, kind)

    def _capture(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> CapturedCall:
        """Put the call on the stream being captured; nothing runs before the graph's replay."""
        if self._on_stream is None:
            arguments = stream_context(), self._layer, self.layer_idx
            self._on_stream = _ext.StreamLayer(*arguments), _ext.StreamLayer(*arguments, True)
        on_stream, deferred_on_stream = self._on_stream
        # Copies that this makes are freed here, but reused only by what comes later on the stream.
        x, ids, weights = contiguous(hidden_states, topk_ids, topk_weights)
        before = self._take_deferred(x, OnStream)
        stream = current_stream(x)
        if self._num_deferred:
            ids, later = split_lightest(ids, weights, self._num_deferred)
        on_stream.submit(stream, *self._inputs(x, ids, weights))
        if self._num_deferred:
            deferred_on_stream.submit(stream, *self._inputs(x, later, weights))
            LEFT.swap(Deferred(self.layer_idx, OnStream(deferred_on_stream, x)))
        return CapturedCall(OnStream(on_stream, x), before)

    def _inputs(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[int, str, int, int, bool, int]:
        """A captured call's inputs as the extension takes them."""
        return (
            x.data_ptr(),
            _ACTIVATION_DTYPES[x.dtype],
            x.shape[0],
            ids.data_ptr(),
            ids.dtype == torch.int64,
            weights.data_ptr(),
        )

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
