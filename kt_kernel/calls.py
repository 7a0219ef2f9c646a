"""A layer's call on its way: its inputs, and where its output is had from."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch

from kt_kernel import _ext
from kt_kernel.errors import UserError

#: Of hidden states and outputs; the extension's names for them.
ACTIVATION_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Batch(NamedTuple):
    """A call's inputs, on one device.

    Attributes:
        x: bf16 or fp32 [T, H], the hidden states.
        ids: int32 or int64 [T, k], the experts of each token; -1 is none.
        weights: fp32 [T, k], by what factor each counts.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def contiguous(self) -> Batch:
        """The tensors themselves where they are as the extension wants them, else copies.

        Ids keep their dtype: narrowed here, int64 ones outside int32 would become others.
        """
        return Batch(self.x.contiguous(), self.ids.contiguous(), self.weights.contiguous())

    def detached(self) -> Batch:
        """Tensors that NumPy takes."""
        return Batch(self.x.detach(), self.ids, self.weights.detach())


def current_stream(tensor: torch.Tensor) -> int:
    """Raw handle of the current CUDA stream of the tensor's device; 0 on the CPU."""
    if not tensor.is_cuda:
        return 0
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


class Call(Protocol):
    """A call that was submitted."""

    def result(self) -> torch.Tensor:
        """Its output [T, H]: waits for it, or puts its end on the stream being captured."""


class Queued(NamedTuple):
    """A job and the tensor that it writes to, which it holds, too, until it has ended."""

    job: _ext.Job
    output: torch.Tensor

    def result(self) -> torch.Tensor:
        """Wait for the job; its output, [T, H]."""
        self.job.wait()
        return self.output


class OnStream(NamedTuple):
    """A call put on the CUDA stream that is being captured, and what its output is like."""

    layer: _ext.StreamLayer
    like: torch.Tensor

    def result(self) -> torch.Tensor:
        """Put the call's end on the stream; what its output will be, [T, H]."""
        output = torch.empty_like(self.like)
        self.layer.sync(current_stream(output), output.data_ptr())
        return output


#: What a layer's call leaves: in main memory, or on the CUDA stream that is being captured.
Left = TypeVar("Left", _ext.Deferred, _ext.StreamLayer)


class Deferred(NamedTuple):
    """The experts of a layer's call that go into the next MoE layer's output.

    Attributes:
        layer_idx: the layer's.
        shape: of its batch, [T, H].
        left: what the next layer's call takes.
    """

    layer_idx: int
    shape: torch.Size
    left: _ext.Deferred | _ext.StreamLayer

    def into(self, layer_idx: int, shape: torch.Size, kind: type[Left]) -> Left | None:
        """What the call of layer ``layer_idx`` with a batch [T, H] takes, in a pass of this kind.

        A pass goes through the layers in their order: what a later layer or this one has left is
        of a pass that was never finished, and is dropped.

        Raises:
            UserError: it is of another batch.
        """
        if not isinstance(self.left, kind) or self.layer_idx >= layer_idx:
            return None
        if self.shape != shape:
            raise UserError(
                f"layer {layer_idx} is called with {shape[0]} tokens of {shape[1]} after layer "
                f"{self.layer_idx} has deferred experts of {self.shape[0]} tokens of "
                f"{self.shape[1]}: expected the same batch; "
                "set KT_MAX_DEFERRED_EXPERTS_PER_TOKEN=none"
            )
        return self.left


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
# Of a pass of the parent's, whose workers a fork does not have.
os.register_at_fork(after_in_child=lambda: LEFT.swap(None))


class FromCuda(NamedTuple):
    """A call whose inputs are on their way from a CUDA device.

    Attributes:
        device: where the output goes.
        copied: when ``inputs`` are there.
        inputs: in pinned memory.
        start: starts the call on the workers.
    """

    device: torch.device
    copied: torch.cuda.Event
    inputs: Batch
    start: Callable[[Batch], Queued]

    def result(self) -> torch.Tensor:
        """Wait for the inputs, then for the call; its output on the device, [T, H]."""
        self.copied.synchronize()
        return self.start(self.inputs).result().to(self.device)
