"""Checks made before the first byte is written.

They read ``config.json``, the index and the shards' headers, never tensor data, so the mistake that
would stop a conversion after hours is found in seconds.
"""

from __future__ import annotations

import json
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
INPUT_DTYPES = {"fp8": "F8_E4M3", "bf16": "BF16", "fp16": "F16", "int4": "I32"}
#: Weights of a group of compressed-tensors' int4 that have one scale.
INT4_GROUPS = (32, 64, 128)


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
    group = _int4_group(checkpoint) if input_type == "int4" else 0
    expected: set[str] = set()
    for layer_idx in layers:
        for expert in range(layout.num_experts):
            for projection in PROJECTIONS:
                item = ExpertProjection(layer_idx, expert, projection)
                n, k = layout.projection_shape(projection)
                names = item.tensors(input_type)
                if input_type == "int4":
                    _check_tensor(checkpoint, names[0], ("I32",), (n, k // 8))
                    _check_tensor(checkpoint, names[1], ("BF16", "F16", "F32"), (n, k // group))
                    _check_tensor(checkpoint, names[2], ("I64", "I32"), (2,))
                else:
                    _check_tensor(checkpoint, names[0], (INPUT_DTYPES[input_type],), (n, k))
                if input_type == "fp8":
                    _check_tensor(checkpoint, names[1], ("F32",), scale_shape((n, k)))
                expected.update(names)
    _check_no_others(checkpoint, expected)


def detect_input_type(checkpoint: Checkpoint) -> str:
    """The ``--input-type`` of a checkpoint, by its first expert.

    Raises:
        UserError: its weights are of no type that can be converted; names it.
    """
    item = ExpertProjection(checkpoint.dims.moe_layers()[0], 0, "gate")
    if checkpoint.shard_of(item.tensors("int4")[0]) is not None:
        return "int4"
    stem = item.weight.removesuffix(".weight")
    if checkpoint.shard_of(item.weight) is None and checkpoint.shard_of(f"{stem}.qweight"):
        raise UserError(
            f"{checkpoint.shard_of(f'{stem}.qweight')} holds {stem}.qweight, the layout of GPTQ "
            f"and AWQ: expected bf16, fp16, FP8 or compressed-tensors (weight_packed); convert the "
            f"original checkpoint, or one that was saved with compressed-tensors"
        )
    found = checkpoint.entry(item.weight).dtype
    for input_type, dtype in INPUT_DTYPES.items():
        if found == dtype and input_type != "int4":
            return input_type
    raise UserError(
        f"{item.weight} in {checkpoint.shard_of(item.weight)} is {found}: expected one of "
        f"{', '.join(INPUT_DTYPES)}; this checkpoint cannot be converted"
    )


def _int4_group(checkpoint: Checkpoint) -> int:
    """Check what config.json says of compressed-tensors; the weights of a group."""
    found = checkpoint.dims.int4_scheme
    group = found.get("group_size")
    expected = {
        "format": "pack-quantized",
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "actorder": None,
    }
    # What compressed-tensors takes for a field that is absent, when there is a group size.
    absent = {"type": "int", "symmetric": True, "strategy": "group"}
    for key, value in expected.items():
        given = found.get(key)
        # It takes false for no actorder, as for null.
        if (absent.get(key) if given is None else given) not in (value, value or False):
            raise UserError(
                f"{checkpoint.config_path}: quantization_config of the experts has {key} "
                f"{json.dumps(given)}, expected {json.dumps(value)}: no other scheme of "
                f"compressed-tensors is supported"
            )
    if type(group) is not int or group not in INT4_GROUPS:
        raise UserError(
            f"{checkpoint.config_path}: quantization_config has group_size {json.dumps(group)}, "
            f"expected one of {', '.join(map(str, INT4_GROUPS))}"
        )
    return group


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the FP8 block scales of a weight of this shape; the last block may be partial."""
    return -(-shape[0] // FP8_BLOCK[0]), -(-shape[1] // FP8_BLOCK[1])


def _check_input_type(checkpoint: Checkpoint, input_type: str, item: ExpertProjection) -> None:
    found = detect_input_type(checkpoint)
    if found == input_type:
        return
    name = item.tensors(found)[0]
    raise UserError(
        f"--input-type is {input_type}, but {name} in {checkpoint.shard_of(name)} is "
        f"{checkpoint.entry(name).dtype}: use --input-type {found}"
    )


def _check_tensor(
    checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    entry = checkpoint.entry(name)
    if entry.dtype not in dtypes:
        raise UserError(
            f"{checkpoint.shard_of(name)}: {name} is {entry.dtype}, expected "
            f"{' or '.join(dtypes)}: the checkpoint does not fit its config.json or --input-type"
        )
    if entry.shape != shape:
        raise UserError(
            f"{checkpoint.shard_of(name)}: {name} has shape {_json_list(entry.shape)}, expected "
            f"{_json_list(shape)}: the checkpoint does not fit its config.json"
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
            reason = f"{checkpoint.config_path} says {dims.experts_key} is {dims.num_experts}"
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
    if output.exists() and input_path.exists() and output.samefile(input_path):
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
