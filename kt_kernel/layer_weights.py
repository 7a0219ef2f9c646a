"""A layer's packed weights in memory: from its file, or quantised from tensors."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kt_kernel import _ext, packed
from kt_kernel.arguments import check_tensor
from kt_kernel.errors import UserError
from kt_kernel.files.safetensors_header import Header, read_header
from kt_kernel.load_progress import load_progress
from kt_kernel.placement.metrics import Pairs

logger = logging.getLogger(__name__)

_SOURCE_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

#: The target that defines what the others compute, bit by bit.
PLAIN_TARGET = "scalar"

#: For the rehearsal, no setting for users: the layer whose file stands under all layers' names.
ONE_FILE_VARIABLE = "_KT_ONE_LAYER_FILE"


class LayerWeights:
    """The experts that a layer holds in its slots.

    Args:
        layer_idx: index of the decoder layer.
        top_k: experts of a token.
        layout: what its files hold; its method may become the other int4.
        engine: whose workers hold and compute the experts.
        mask: true for slots whose expert the GPU runs.
        mask_may_change: then the GPU's experts are loaded, too.

    Attributes:
        engine: as given.
        layout: what a file of theirs holds.
        sources: expert of the file in each slot, -1 for none; empty before ``load``.
        tables: the file's, int8 [256, 16], or None for int8.
        layer: the extension's; another one after weights of another method were loaded.
    """

    def __init__(
        self,
        layer_idx: int,
        top_k: int,
        layout: packed.PackedLayout,
        engine: _ext.Engine,
        mask: _ext.ExpertMask,
        mask_may_change: bool,
    ) -> None:
        self.layer_idx, self.top_k, self.engine = layer_idx, top_k, engine
        self._mask, self._mask_may_change = mask, mask_may_change
        self.sources: list[int] = []
        self.tables: NDArray[np.int8] | None = None
        #: How often calls have named each slot whose expert was not computed here.
        self.counts_on_card = np.zeros(layout.num_experts, np.int64)
        self._experts: list[int] = []  # expert of the checkpoint in each slot, on the GPU or here
        #: Of the checkpoint that the file was made from; empty where it does not say.
        self.fingerprint = ""
        self._use(layout)

    def _use(self, layout: packed.PackedLayout) -> None:
        self.layout = layout
        self.layer = _ext.Layer(
            self.engine,
            layout.num_experts,
            self.top_k,
            layout.hidden_size,
            layout.intermediate_size,
            layout.method,
            self._mask,
        )

    @property
    def on_gpu(self) -> NDArray[np.bool_]:
        """bool [E], true for experts that the GPU runs; may change between calls."""
        return self._mask.array

    def cpu_slots(self) -> list[int]:
        """Ids of the experts that run here; empty before ``load``."""
        on_gpu = self._mask.array.tolist()
        return [slot for slot, e in enumerate(self.sources) if e >= 0 and not on_gpu[slot]]

    def expert_counts(self) -> NDArray[np.int64]:
        """[E] how often calls have named each expert of the checkpoint, on the GPU or here."""
        counts = np.zeros(self.layout.num_experts, np.int64)
        named = self.layer.token_counts + self.counts_on_card
        np.add.at(counts, self._experts, named)
        return counts

    def routed_pairs(self) -> Pairs:
        """How many (token, expert) pairs calls have named, by where they were computed."""
        named, on_gpu = self.layer.token_counts, self.on_gpu
        streamed = int(self.counts_on_card.sum())
        return Pairs(int(named[on_gpu].sum()), streamed, int(named[~on_gpu].sum()))

    def plain_copy(self, weight_path: str | None, slots: Sequence[int], pools: int) -> LayerWeights:
        """Some of the experts, read from the file again, on the plain target.

        Raises:
            UserError: the file is gone or damaged.
        """
        target = self.engine.target if self.engine.target == "reference" else PLAIN_TARGET
        engine = _ext.Engine(self.engine.cpus, pools, target)
        copy = LayerWeights(
            self.layer_idx, self.top_k, self.layout, engine, self._mask, self._mask_may_change
        )
        sources = [e if slot in slots else -1 for slot, e in enumerate(self.sources)]
        copy._read_file(weight_path, sources)
        return copy

    def load(self, weight_path: str | None, physical_to_logical: torch.Tensor) -> Path:
        """Read the layer's packed file from a folder; the file's path.

        Args:
            weight_path: the folder; None is an error.
            physical_to_logical: int64 [E]; slot ``p`` gets the file's expert ``map[p]``.

        Raises:
            UserError: no file, or one of another layer, model or method, or a damaged one.
        """
        sources = self._sources(physical_to_logical)
        started = time.monotonic()
        path = self._read_file(weight_path, sources)
        self.sources = sources
        line = load_progress(path.parent).line(
            self.layer_idx, self.layer.weight_bytes, started, time.monotonic()
        )
        shared = "" if (layer := _only_layer()) is None else f", weights of layer {layer}"
        count = sum(s >= 0 for s in sources)
        logger.info("kt_kernel: %s, %d experts on the CPU%s", line, count, shared)
        return path

    def _read_file(self, weight_path: str | None, sources: list[int]) -> Path:
        """Fill the slots with these experts of the layer's file, -1 for none; its path."""
        if weight_path is None:
            raise UserError("weight_path is not set: pass --kt-weight-path")
        path = Path(weight_path) / packed.layer_file_name(self.layer_idx)
        if not path.parent.is_dir():
            raise UserError(
                f"weight path {path.parent} does not exist: run python -m convert first"
            )
        header = read_header(path)
        self._use_method(header.metadata.get("method", ""))
        self.fingerprint = header.metadata.get("source_fingerprint", "")
        packed.check_layer_header(header, self.layout, _number_in_file(header, self.layer_idx))
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
        _check_scales(header, self.layer_idx)
        try:
            # As bytes: a name need not be Unicode, what the extension says of it has to be.
            self.layer.load_file(os.fsencode(path), offsets, tables, sources)
        except UnicodeDecodeError as error:
            reason = error.object.decode(errors="backslashreplace")
            raise UserError(f"layer {self.layer_idx}: {reason}") from None
        except RuntimeError as error:
            # Some Pythons leave out what is no text.
            reason = str(error) or "its file cannot be read"
            raise UserError(f"layer {self.layer_idx}: {reason}") from None
        self.tables = tables
        return path

    def load_from_tensors(
        self,
        tensors: Sequence[torch.Tensor],
        physical_to_logical: torch.Tensor,
        quant_method: str | None,
    ) -> None:
        """Quantise unquantised tensors, those of gate, up and down.

        Args:
            tensors: bf16, fp16 or fp32 [E, I, H] twice, and [E, H, I].
            physical_to_logical: int64 [E], as for ``load``.
            quant_method: one of ``packed.METHODS``, or None for the method at hand.

        Raises:
            UserError: a wrong shape, dtype or method, or a weight that is not finite.
        """
        if quant_method is not None:
            if packed.served_as(quant_method) != self._served_as:
                raise UserError(
                    f"quant_method is {quant_method!r}, which {self._served_as} does not stand for"
                )
            self._use_method(quant_method)
        dtype = getattr(tensors[0], "dtype", None)
        if dtype not in _SOURCE_DTYPES:
            raise UserError(f"gate_proj is {dtype}: expected bfloat16, float16 or float32")
        for name, tensor in zip(packed.PROJECTIONS, tensors, strict=True):
            shape = (self.layout.num_experts, *self.layout.projection_shape(name))
            check_tensor(f"{name}_proj", tensor, shape, (dtype,))
        bits = dtype if dtype == torch.float32 else torch.uint16
        arrays = [t.detach().to("cpu").contiguous().view(bits).numpy() for t in tensors]
        sources = self._sources(physical_to_logical)
        try:
            self.layer.load_matrices(arrays, _SOURCE_DTYPES[dtype], sources)
        except ValueError as error:
            raise UserError(f"layer {self.layer_idx}: {error}") from None

    @property
    def _served_as(self) -> str:
        return packed.METHODS[self.layout.method].kt_method

    def _use_method(self, quant_method: str) -> None:
        """Hold weights of this method, if the same ``--kt-method`` stands for it, too."""
        served_as = packed.served_as(quant_method)
        if quant_method != self.layout.method and served_as == self._served_as:
            self._use(dataclasses.replace(self.layout, method=quant_method))

    def _sources(self, physical_to_logical: torch.Tensor) -> list[int]:
        """Expert of the file for each slot, -1 for a slot that never runs on the CPU."""
        count = self.layout.num_experts
        integers = (torch.int64, torch.int32)
        check_tensor("physical_to_logical_map", physical_to_logical, (count,), integers)
        sources: list[int] = physical_to_logical.tolist()
        if not all(0 <= s < count for s in sources):
            raise UserError(
                f"physical_to_logical_map has entries in [{min(sources)}, {max(sources)}]: "
                f"expected [0, {count - 1}]"
            )
        self._experts = sources
        if self._mask_may_change:
            return sources
        return [-1 if gpu else s for s, gpu in zip(sources, self._mask.array, strict=True)]


def _only_layer() -> int | None:
    """The layer whose file stands under all layers' names; None where each has its own.

    Raises:
        UserError: the variable holds no layer's number.
    """
    text = os.environ.get(ONE_FILE_VARIABLE)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{ONE_FILE_VARIABLE} is {text!r}: expected the number of a decoder layer")
    return int(text)


def _number_in_file(header: Header, layer_idx: int) -> int:
    """The layer's number that its file has to hold: its own, or that of the only file.

    Raises:
        UserError: one file stands for all layers, and was converted from a checkpoint.
    """
    only = _only_layer()
    if only is None:
        return layer_idx
    # A model's layers differ: served so, its answers would be wrong and nothing would show it.
    if "source_fingerprint" in header.metadata:
        raise UserError(
            f"{header.path} was converted from a checkpoint, and {ONE_FILE_VARIABLE}, which lets "
            f"layers share a file of random weights, is {only}: unset it"
        )
    return only


def _check_scales(header: Header, layer_idx: int) -> None:
    """Raises UserError for a scale that is no number: it would make every answer none.

    They are 6 MB of a layer of V3.2, which has 5.8 GB. What cannot be read is for the extension to
    tell, which reads them next and leaves none in the page cache.
    """
    for name in packed.PROJECTIONS:
        entry = header.tensors[f"{name}.scales"]
        count = (entry.end - entry.begin) // 2
        try:
            bits = np.fromfile(header.path, np.uint16, count, offset=entry.begin)
        except OSError:
            return
        if bits.size < count:
            return
        bits = bits.reshape(entry.shape)
        exponent, fraction = 0x7F80, 0x7F  # of bf16
        wrong = np.argwhere((bits & exponent) == exponent)
        if len(wrong):
            expert, row = wrong[0]
            value = "nan" if bits[expert, row] & fraction else "inf"
            raise UserError(
                f"layer {layer_idx}: {header.path}: expected finite scales, found {value} for row "
                f"{row} of expert {expert}'s {name} ({len(wrong)} in all): the file is damaged: "
                "delete it and convert again"
            )
