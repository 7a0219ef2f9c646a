"""How a layer's calls are started: which of their experts are computed when, and by which path."""

from __future__ import annotations

import torch

from kt_kernel import _ext
from kt_kernel.calls import (
    ACTIVATION_DTYPES,
    LEFT,
    Batch,
    Call,
    Deferred,
    FromCuda,
    Left,
    OnStream,
    Queued,
    current_stream,
)
from kt_kernel.errors import UserError
from kt_kernel.gpu_prefill.layer import LayerOnCard
from kt_kernel.layer_weights import LayerWeights
from kt_kernel.stream import stream_context


class LayerCalls:
    """Starts the calls of a layer.

    Args:
        weights: the layer's.
        num_deferred: of a token's experts, that many of the smallest weights are deferred.
    """

    def __init__(self, weights: LayerWeights, num_deferred: int) -> None:
        self.num_deferred = num_deferred
        self._weights = weights
        #: Divides calls of many tokens between the card and the CPUs, where there is a card.
        self.on_card: LayerOnCard | None = None
        #: Calls in CUDA graphs, and of what.
        self._on_stream: tuple[_ext.StreamLayer, _ext.Layer] | None = None

    def leave_card(self) -> None:
        """Before the layer's weights change: no copy to the card reads them any more."""
        if self.on_card is not None:
            self.on_card.forget()
            self.on_card = None

    def start(self, batch: Batch) -> Call:
        """Start a call; what its output is had from."""
        if batch.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.capture(batch)
        on_card = self.on_card if self.on_card and self.on_card.takes(batch.x) else None
        # What the card gets depends on how long things take; what is deferred must not.
        queue = self.queue if on_card is None else self.queue_all
        if not batch.x.is_cuda:
            divided = on_card.divide(batch, batch, queue) if on_card else None
            return divided or queue(batch)
        copied, here = _copy_from_cuda(batch)
        if on_card is not None:
            copied.synchronize()
            if divided := on_card.divide(batch, here, queue):
                return divided
        return FromCuda(batch.x.device, copied, here, queue)

    def queue(self, batch: Batch) -> Queued:
        """Give a batch in main memory to the workers."""
        return self._queue(batch, self.num_deferred)

    def queue_all(self, batch: Batch) -> Queued:
        """The same, with none of its experts deferred."""
        return self._queue(batch, 0)

    def _queue(self, batch: Batch, num_deferred: int) -> Queued:
        batch = _for_workers(batch)
        before = self._take_deferred(batch, _ext.Deferred)
        wide = batch.x.dtype == torch.float32
        rows = batch.x.numpy() if wide else batch.x.view(torch.uint16).numpy()
        memory = self._weights.engine.take_like(rows)
        ids, weights = batch.ids.numpy(), batch.weights.numpy()
        try:
            job, left = self._weights.layer.submit(rows, ids, weights, memory, num_deferred, before)
        except ValueError as error:
            raise UserError(f"layer {self._weights.layer_idx}: {error}") from None
        self._leave(batch, left)
        output = torch.from_numpy(memory)
        return Queued(job, output if wide else output.view(torch.bfloat16))

    def capture(self, batch: Batch) -> OnStream:
        """Put a call on the stream being captured; nothing runs before the graph's replay."""
        on_stream = self._stream_layer()
        # Copies that this makes are freed here, but reused only by what comes later on the stream.
        batch = batch.contiguous()
        on_stream.submit(
            current_stream(batch.x),
            batch.x.data_ptr(),
            ACTIVATION_DTYPES[batch.x.dtype],
            batch.x.shape[0],
            batch.ids.data_ptr(),
            batch.ids.dtype == torch.int64,
            batch.weights.data_ptr(),
            self.num_deferred,
            self._take_deferred(batch, _ext.StreamLayer),
        )
        self._leave(batch, on_stream if self.num_deferred else None)
        return OnStream(on_stream, batch.x)

    def _stream_layer(self) -> _ext.StreamLayer:
        """Where another layer's weights were loaded, graphs of the one before fail from then on."""
        layer = self._weights.layer
        if self._on_stream is None or self._on_stream[1] is not layer:
            on_stream = _ext.StreamLayer(stream_context(), layer, self._weights.layer_idx)
            self._on_stream = on_stream, layer
        return self._on_stream[0]

    def _take_deferred(self, batch: Batch, kind: type[Left]) -> Left | None:
        """What the MoE layer before has left for this one's output, in a pass of this kind."""
        deferred = LEFT.swap(None)
        if deferred is None:
            return None
        return deferred.into(self._weights.layer_idx, batch.x.shape, kind)

    def _leave(self, batch: Batch, left: _ext.Deferred | _ext.StreamLayer | None) -> None:
        if left is not None:
            LEFT.swap(Deferred(self._weights.layer_idx, batch.x.shape, left))


def _for_workers(batch: Batch) -> Batch:
    batch = batch.contiguous()
    if batch.x.requires_grad or batch.weights.requires_grad:
        batch = batch.detached()
    return batch


def _copy_from_cuda(batch: Batch) -> tuple[torch.cuda.Event, Batch]:
    """Start device-to-host copies on the current stream, ahead of SGLang's in-place masking."""

    def to_pinned(tensor: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    inputs = Batch(*(to_pinned(tensor) for tensor in batch))
    copied = torch.cuda.Event()
    copied.record()
    return copied, inputs
