"""Write the tiny checkpoint: ``python -m examples.tiny.make_checkpoint --output DIR``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from convert.source.checkpoint import INDEX_NAME
from convert.source.config import CONFIG_NAME
from examples.tiny.config import TinySizes, generation_config, model_config
from examples.tiny.fp8 import dequantize_blocks, quantize_blocks
from examples.tiny.tensors import SCALE_SUFFIX, TensorSpec, tensor_specs, tensor_value
from examples.tiny.tokenizer import build_tokenizer, write_tokenizer
from kt_kernel.errors import UserError

SHARD_BYTES = 3 << 20
"""Size after which a new shard is begun; small, so that even this checkpoint has several."""


def stored_tensors(spec: TensorSpec, value: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Return the tensors that the checkpoint stores for ``spec`` and its float32 value, by name.

    A "bf16" checkpoint holds exactly the values that the "fp8" one dequantises to (three mantissa
    bits times a power of two fit in bfloat16), so both are the same model.
    """
    if spec.kind == "f32":
        return {spec.name: value}
    if spec.kind == "bf16":
        return {spec.name: value.to(torch.bfloat16)}
    codes, scales = quantize_blocks(value)
    if dtype == "bf16":
        return {spec.name: dequantize_blocks(codes, scales).to(torch.bfloat16)}
    return {spec.name: codes, spec.name + SCALE_SUFFIX: scales}


def make_checkpoint(output: Path, seed: int = 0, dtype: str = "fp8") -> int:
    """Write a random checkpoint into ``output`` and return the bytes of its tensors.

    ``output`` is made if missing; files of an earlier run are replaced. ``dtype`` is "fp8" or
    "bf16". The same arguments give the same bytes.

    Raises UserError if ``output`` cannot be written, or holds files that this does not write.
    """
    sizes = TinySizes()

    def value(spec: TensorSpec) -> torch.Tensor:
        return torch.from_numpy(tensor_value(spec, seed))

    return write_checkpoint(output, sizes, value, build_tokenizer(sizes.vocab_size), dtype)


def write_checkpoint(
    output: Path,
    sizes: TinySizes,
    value: Callable[[TensorSpec], torch.Tensor],
    tokenizer: Tokenizer,
    dtype: str = "fp8",
) -> int:
    """Write the checkpoint whose tensors have the float32 ``value``; as ``make_checkpoint``."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        _remove_earlier(output)
        total_bytes = _write_shards(output, sizes, value, dtype)
        _write_json(output / CONFIG_NAME, model_config(sizes, dtype))
        _write_json(output / "generation_config.json", generation_config())
        write_tokenizer(output, tokenizer)
    except OSError as error:
        raise UserError(f"cannot write the checkpoint to {output}: {error.strerror}") from error
    return total_bytes


_OTHER_FILES = {
    CONFIG_NAME,
    "generation_config.json",
    INDEX_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
}


def _remove_earlier(output: Path) -> None:
    files = sorted(output.iterdir())
    for file in files:
        ours = file.name in _OTHER_FILES or file.match("model-*.safetensors")
        if not ours:
            raise UserError(
                f"{output} holds {file.name}, which is not part of a checkpoint; "
                "expected an empty or new folder, choose another --output"
            )
    for file in files:
        file.unlink()


def _write_shards(
    output: Path, sizes: TinySizes, value: Callable[[TensorSpec], torch.Tensor], dtype: str
) -> int:
    shards: list[dict[str, torch.Tensor]] = [{}]
    shard_bytes = total_bytes = 0
    for spec in tensor_specs(sizes):
        tensors = stored_tensors(spec, value(spec), dtype)
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        if shards[-1] and shard_bytes + nbytes > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1].update(tensors)
        shard_bytes += nbytes
        total_bytes += nbytes

    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        # The publisher's shard names have six digits after "of".
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file(tensors, output / name, metadata={"format": "pt"})
        (output / name).chmod(0o644)  # safetensors makes it readable by the owner alone
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(output / INDEX_NAME, index)
    return total_bytes


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code (0, or 2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny.make_checkpoint",
        description="Write a tiny random checkpoint in DeepSeek V3.2's format.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("fp8", "bf16"),
        default="fp8",
        help="how linear layers are stored; both are the same model (default: fp8)",
    )
    args = parser.parse_args(argv)
    try:
        nbytes = make_checkpoint(args.output, args.seed, args.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {args.dtype} checkpoint, {nbytes / 1e6:.1f} MB of tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
