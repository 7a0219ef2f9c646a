"""The routed experts of a checkpoint in its number format: found, checked and read."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from convert.source.checkpoint import Checkpoint
from convert.source.formats import FORMATS, RawTensor, SourceFormat
from kt_kernel.errors import UserError
from kt_kernel.packed import PROJECTIONS, PackedLayout

_EXPERT_NAME = re.compile(r"model\.layers\.([0-9]+)\.mlp\.experts\.([0-9]+)\.(.+)", re.DOTALL)
#: More digits than any index has, and fewer than Python refuses to read.
_DIGITS = 18


@dataclass(frozen=True)
class ExpertProjection:
    """One projection matrix of one routed expert; ``projection`` is ``gate``, ``up``, ``down``."""

    layer_idx: int
    expert: int
    projection: str

    @property
    def weight(self) -> str:
        """Name of the weight; a format's tensors are named after it."""
        expert = f"model.layers.{self.layer_idx}.mlp.experts.{self.expert}"
        return f"{expert}.{self.projection}_proj.weight"


def parse_expert_name(name: str) -> tuple[int, int, str] | None:
    """(layer, expert, rest of the name) of a routed expert's tensor, None for any other tensor."""
    match = _EXPERT_NAME.fullmatch(name)
    return (int(match[1][:_DIGITS]), int(match[2][:_DIGITS]), match[3]) if match else None


class ExpertSource:
    """The routed experts of an open checkpoint.

    Args:
        checkpoint: where they are.
        input_type: name of their format, or ``auto``: what the first expert has.

    Raises:
        UserError: ``auto``, and the weights are of no format that can be converted; names it.
    """

    def __init__(self, checkpoint: Checkpoint, input_type: str) -> None:
        self.checkpoint = checkpoint
        found = _detect(checkpoint) if input_type == "auto" else FORMATS[input_type]
        self.format: SourceFormat = found

    def tensors(self, item: ExpertProjection) -> tuple[str, ...]:
        """Names of the tensors that hold a matrix; the weights come first."""
        return tuple(item.weight + suffix for suffix in self.format.suffixes)

    def items(self, layer_idx: int) -> list[ExpertProjection]:
        """Every matrix of a layer, in the order in which they lie in the shards."""
        wanted = [
            ExpertProjection(layer_idx, expert, projection)
            for expert in range(self.checkpoint.dims.num_experts)
            for projection in PROJECTIONS
        ]
        return sorted(wanted, key=lambda item: self.checkpoint.position(self.tensors(item)[0]))

    def layer_tensors(self, layer_idx: int) -> dict[str, list[str]]:
        """Shard -> the tensors of a layer's experts that it holds, in file order."""
        position = self.checkpoint.position
        shards: dict[str, list[str]] = {}
        for item in self.items(layer_idx):
            for name in self.tensors(item):
                shards.setdefault(position(name)[0], []).append(name)
        return {shard: sorted(shards[shard], key=position) for shard in sorted(shards)}

    def read(self, item: ExpertProjection) -> list[RawTensor]:
        """The tensors of a matrix.

        Raises:
            UserError: one cannot be read.
        """
        entry, read = self.checkpoint.entry, self.checkpoint.read
        return [RawTensor(read(name), entry(name).dtype) for name in self.tensors(item)]

    def weights(self, item: ExpertProjection) -> np.ndarray:
        """A matrix as float32 [N, K], decoded with NumPy."""
        return self.format.decode(self.read(item))

    def layout(self, method: str) -> PackedLayout:
        """The layout of every layer file that these experts become.

        Raises:
            UserError: a dimension is not a multiple of the packed format's block; names the config.
        """
        dims = self.checkpoint.dims
        try:
            return PackedLayout(dims.num_experts, dims.hidden_size, dims.intermediate_size, method)
        except UserError as error:
            raise UserError(f"{self.checkpoint.config_path}: {error}") from None

    def check(self, layout: PackedLayout) -> None:
        """Check that every tensor is there with the right shape and dtype, and no other.

        Reads ``config.json``, the index and the shards' headers, never tensor data, so the mistake
        that would stop a conversion after hours is found in seconds.

        Raises:
            UserError: names the file, the tensor, what was found and what was expected.
        """
        self._check_format()
        dims = self.checkpoint.dims
        self.format.check_config(dims, self.checkpoint.config_path)
        names: set[str] = set()
        for layer_idx in dims.moe_layers():
            for expert in range(layout.num_experts):
                for projection in PROJECTIONS:
                    item = ExpertProjection(layer_idx, expert, projection)
                    expected = self.format.expected(layout.projection_shape(projection), dims)
                    for name, (dtypes, shape) in zip(self.tensors(item), expected, strict=True):
                        self._check_tensor(name, dtypes, shape)
                        names.add(name)
        self._check_no_others(names)

    def _check_format(self) -> None:
        fitting = _fitting(self.checkpoint)
        if self.format in fitting:
            return
        found = fitting[0]
        name = _first_expert(self.checkpoint) + found.suffixes[0]
        raise UserError(
            f"--input-type is {self.format.name}, but {name} in {self.checkpoint.shard_of(name)} "
            f"is {self.checkpoint.entry(name).dtype}: use --input-type {found.name}"
        )

    def _check_tensor(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        entry, shard = self.checkpoint.entry(name), self.checkpoint.shard_of(name)
        if entry.dtype not in dtypes:
            raise UserError(
                f"{shard}: {name} is {entry.dtype}, expected {' or '.join(dtypes)}: the checkpoint "
                f"does not fit its config.json or --input-type"
            )
        if entry.shape != shape:
            raise UserError(
                f"{shard}: {name} has shape {list(entry.shape)}, expected {list(shape)}: the "
                f"checkpoint does not fit its config.json"
            )

    def _check_no_others(self, expected: set[str]) -> None:
        """Experts that the config does not know would be left out silently: refuse them."""
        checkpoint, dims = self.checkpoint, self.checkpoint.dims
        for name in checkpoint.names:
            parsed = parse_expert_name(name)
            if parsed is None or name in expected:
                continue
            layer_idx, expert, _ = parsed
            if layer_idx >= dims.num_layers:
                continue  # an MTP layer: its experts stay on the GPU
            if not dims.is_moe_layer(layer_idx):
                reason = f"{checkpoint.config_path} says that layer {layer_idx} is dense"
            elif expert >= dims.num_experts:
                reason = f"{checkpoint.config_path} says {dims.experts_key} is {dims.num_experts}"
            else:
                reason = "no tensor of that name belongs to a checkpoint of this --input-type"
            raise UserError(f"{checkpoint.shard_of(name)} holds {name}, but {reason}")


def _first_expert(checkpoint: Checkpoint) -> str:
    return ExpertProjection(checkpoint.dims.moe_layers()[0], 0, "gate").weight


def _detect(checkpoint: Checkpoint) -> SourceFormat:
    """The format of a checkpoint, by its first expert.

    Raises:
        UserError: its weights are of no format that can be converted, or of more than one.
    """
    fitting = _fitting(checkpoint)
    if len(fitting) > 1:
        weight = _first_expert(checkpoint)
        found = (
            f"{weight + fit.suffixes[0]} in {checkpoint.shard_of(weight + fit.suffixes[0])} "
            f"({fit.name})"
            for fit in fitting
        )
        raise UserError(
            f"an expert has weights in {len(fitting)} formats: {', '.join(found)}; expected "
            f"one: the index names shards of different checkpoints"
        )
    return fitting[0]


def _fitting(checkpoint: Checkpoint) -> list[SourceFormat]:
    """The formats, at least one, that the first expert's weights fit by their name and dtype.

    Where none does, those whose name for weights is there: their check says what is wrong.

    Raises:
        UserError: its weights are of no format that can be converted; names it.
    """
    weight, shard_of = _first_expert(checkpoint), checkpoint.shard_of
    named = [f for f in FORMATS.values() if shard_of(weight + f.suffixes[0]) is not None]
    fitting = [f for f in named if checkpoint.entry(weight + f.suffixes[0]).dtype == f.dtype]
    fitting = fitting or [f for f in named if f.suffixes[0]]
    if fitting:
        return fitting
    stem = weight.removesuffix(".weight")
    if shard_of(weight) is None and shard_of(f"{stem}.qweight"):
        raise UserError(
            f"{shard_of(f'{stem}.qweight')} holds {stem}.qweight, the layout of GPTQ and AWQ: "
            f"expected bf16, fp16, FP8 or compressed-tensors (weight_packed); convert the original "
            f"checkpoint, or one that was saved with compressed-tensors"
        )
    raise UserError(
        f"{weight} in {shard_of(weight)} is {checkpoint.entry(weight).dtype}: expected one of "
        f"{', '.join(FORMATS)}; this checkpoint cannot be converted"
    )
