"""Checks made before the first byte is written.

They read ``config.json``, the index and the shards' headers, never tensor data, so the mistake that
would stop a conversion after hours is found in seconds.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from convert.checkpoint import (
    Checkpoint,
    ExpertProjection,
    parse_expert_name,
)
from convert.model_config import FP8_BLOCK
from kt_kernel.errors import UserError
from kt_kernel.packed import PROJECTIONS, PackedLayout

#: --input-type -> dtype of the weights in the shards.
INPUT_DTYPES = {"fp8": "F8_E4M3", "bf16": "BF16", "fp16": "F16"}


def packed_layout(checkpoint: Checkpoint, method: str) -> PackedLayout:
    """The layout of every layer file that this checkpoint becomes.

    Raises:
        UserError: a dimension is not a multiple of the packed format's block; names the config.
    """
    dims = checkpoint.dims
    try:
        return PackedLayout(dims.num_experts, dims.hidden_size, dims.intermediate_size, method)
    except UserError as error:
        raise UserError(f"{checkpoint.config_path}: {error}") from None


def check_source(checkpoint: Checkpoint, input_type: str, layout: PackedLayout) -> None:
    """Check that every expert tensor is there with the right shape and dtype, and no other.

    Raises:
        UserError: names the file, the tensor, what was found and what was expected.
    """
    layers = checkpoint.dims.moe_layers()
    _check_input_type(checkpoint, input_type, ExpertProjection(layers[0], 0, "gate"))
    if input_type == "fp8" and checkpoint.dims.fp8_block != FP8_BLOCK:
        raise UserError(
            f"{checkpoint.config_path}: quantization_config.weight_block_size is "
            f"{_json_list(checkpoint.dims.fp8_block)}, expected {_json_list(FP8_BLOCK)}: no other "
            f"FP8 scheme is supported"
        )
    expected = set()
    for layer_idx in layers:
        for expert in range(layout.num_experts):
            for projection in PROJECTIONS:
                item = ExpertProjection(layer_idx, expert, projection)
                shape = layout.projection_shape(projection)
                _check_tensor(checkpoint, item.weight, INPUT_DTYPES[input_type], shape)
                expected.add(item.weight)
                if input_type == "fp8":
                    _check_tensor(checkpoint, item.scale, "F32", scale_shape(shape))
                    expected.add(item.scale)
    _check_no_others(checkpoint, expected)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the FP8 block scales of a weight of this shape; the last block may be partial."""
    return -(-shape[0] // FP8_BLOCK[0]), -(-shape[1] // FP8_BLOCK[1])


def _check_input_type(checkpoint: Checkpoint, input_type: str, item: ExpertProjection) -> None:
    found = checkpoint.entry(item.weight).dtype
    if found == INPUT_DTYPES[input_type]:
        return
    right = [name for name, dtype in INPUT_DTYPES.items() if dtype == found]
    hint = f"use --input-type {right[0]}" if right else "this checkpoint cannot be converted"
    raise UserError(
        f"--input-type is {input_type}, but {item.weight} in {checkpoint.shard_of(item.weight)} "
        f"is {found}: {hint}"
    )


def _check_tensor(checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, int]) -> None:
    entry = checkpoint.entry(name)
    if entry.dtype != dtype:
        raise UserError(
            f"{checkpoint.shard_of(name)}: {name} is {entry.dtype}, expected {dtype}: the "
            f"checkpoint does not fit its config.json or --input-type"
        )
    if entry.shape != shape:
        raise UserError(
            f"{checkpoint.shard_of(name)}: {name} has shape {_json_list(entry.shape)}, expected "
            f"{_json_list(shape)}: the checkpoint does not fit its config.json"
        )
    bits = {"F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32}[dtype]
    nbytes = shape[0] * shape[1] * bits // 8
    if entry.end - entry.begin != nbytes:
        raise UserError(
            f"{checkpoint.shard_of(name)}: {name} spans {entry.end - entry.begin} bytes, expected "
            f"{nbytes}: download this shard again"
        )


def _check_no_others(checkpoint: Checkpoint, expected: set[str]) -> None:
    """Experts that the config does not know would be left out without a word: refuse them."""
    dims = checkpoint.dims
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
            reason = f"{checkpoint.config_path} says n_routed_experts is {dims.num_experts}"
        else:
            reason = "no tensor of that name belongs to a checkpoint of this --input-type"
        raise UserError(f"{checkpoint.shard_of(name)} holds {name}, but {reason}")


def check_output_path(input_path: Path, output: Path) -> None:
    """Check that the output can be a directory of its own.

    Raises:
        UserError: it is the input directory, or it exists and is not a directory.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, expected a directory or nothing yet")
    if output.resolve() == input_path.resolve():
        raise UserError(
            f"--output and --input-path are the same directory, {output}: the packed files need "
            f"one of their own"
        )


def check_free_space(output: Path, needed: int) -> int:
    """Check that ``needed`` more bytes fit beside what ``output`` holds already.

    Returns:
        The free bytes of the file system.

    Raises:
        UserError: says how much is free and how much is needed.
    """
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"not enough free space for --output {output}: expected at least {gigabytes(needed)}, "
            f"found {gigabytes(free)}; free some or choose another file system"
        )
    return free


def gigabytes(count: int | float) -> str:
    """A byte count for people: ``340.2 GB``, ``1.3 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def _json_list(values: tuple[int, ...] | None) -> str:
    return "missing" if values is None else str(list(values))
