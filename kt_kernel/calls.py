"""A layer's call on its way: its tensors, checked and where the extension can read them."""

from __future__ import annotations

import threading
from typing import NamedTuple, TypeVar

import torch

from kt_kernel import _ext
from kt_kernel.errors import UserError


class Queued(NamedTuple):
    """A job and the tensor that it writes to, which it holds, too, until it has ended."""

    job: _ext.Job
    output: torch.Tensor


class OnStream(NamedTuple):
    """A call put on the CUDA stream that is being captured, and what its output is like."""

    layer: _ext.StreamLayer
    like: torch.Tensor

    def output(self) -> torch.Tensor:
        """Put the call's end on the stream; what its output will be, [T, H]."""
        output = torch.empty_like(self.like)
        self.layer.sync(current_stream(output), output.data_ptr())
        return output


C = TypeVar("C", Queued, OnStream)


class Deferred(NamedTuple):
    """The experts of a layer's call that go into the next MoE layer's output."""

    layer_idx: int
    call: Queued | OnStream

    def into(self, layer_idx: int, shape: torch.Size, kind: type[C]) -> C | None:
        """The call, for the output [T, H] of layer ``layer_idx`` in a pass of this kind.

        A pass goes through the layers in their order: what a later layer or this one has left is
        of a pass that was never finished, and is dropped.

        Raises:
            UserError: it is of another batch.
        """
        call = self.call
        left = call.output if isinstance(call, Queued) else call.like
        in_order = self.layer_idx < layer_idx
        if isinstance(call, kind) and in_order and left.shape == shape:
            return call
        if isinstance(call, kind) and in_order:
            raise UserError(
                f"layer {layer_idx} is called with {shape[0]} tokens after layer {self.layer_idx} "
                f"has deferred experts of {left.shape[0]} tokens: expected the same batch; set "
                "KT_MAX_DEFERRED_EXPERTS_PER_TOKEN=none"
            )
        return None


class LeftByThread(threading.local):
    """What the layer called last has deferred; each thread goes through the layers on its own."""

    deferred: Deferred | None = None

    def __get__(self, _: object, owner: type) -> Deferred | None:
        """As an attribute of a class, for reading: what this thread has left."""
        return self.deferred

    def swap(self, deferred: Deferred | None) -> Deferred | None:
        """Put another in its place, or None; what was there."""
        before, self.deferred = self.deferred, deferred
        return before


LEFT = LeftByThread()


class Pending(NamedTuple):
    """A submitted call, and what the layer before left for its output."""

    now: Queued
    before: Queued | None

    def result(self) -> torch.Tensor:
        """Wait for both; their sum, [T, H]."""
        self.now.job.wait()
        if self.before is not None:
            self.before.job.wait()
            self.now.output.add_(self.before.output)
        return self.now.output


class CudaCall(NamedTuple):
    """A call whose inputs are on their way from a CUDA device."""

    copied: torch.cuda.Event
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class CapturedCall(NamedTuple):
    """A call that a CUDA graph is capturing, and what the layer before left for its output."""

    now: OnStream
    before: OnStream | None

    def result(self) -> torch.Tensor:
        """Put both calls' ends on the stream; what their sum will be, [T, H]."""
        output = self.now.output()
        return output if self.before is None else output.add_(self.before.output())


def contiguous(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors themselves where they are as the extension wants them, else copies.

    Ids keep their dtype: narrowed here, int64 ones outside int32 would become others.
    """
    return hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()


def split_lightest(
    ids: torch.Tensor, weights: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids [T, k] without each token's ``count`` smallest weights, and only those; -1 else."""
    lightest = weights.topk(count, largest=False).indices
    later = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, lightest, True)
    return ids.masked_fill(later, -1), ids.masked_fill(~later, -1)


def current_stream(tensor: torch.Tensor) -> int:
    """Raw handle of the current CUDA stream of the tensor's device; 0 on the CPU."""
    if not tensor.is_cuda:
        return 0
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def copy_from_cuda(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> CudaCall:
    """Start device-to-host copies on the current stream, ahead of SGLang's in-place masking."""

    def to_pinned(tensor: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    x, ids, weights = (to_pinned(t) for t in (hidden_states, topk_ids, topk_weights))
    copied = torch.cuda.Event()
    copied.record()
    return CudaCall(copied, x, ids, weights)
