"""The tiny model's formats measured side by side, for ``python -m benchmarks.quality tiny``.

Each variant is served by stock SGLang on the CPU in float32, so that nothing but the experts
differs. "FP8 original" has every expert resident: SGLang's own computation with the checkpoint's
weights. "INT4, one scale a row" is a bf16 checkpoint whose expert weights were rounded to 15 levels
of each row and packed as INT8, whose 255 levels hold those 15 nearly exactly: so it runs with the
same kernels and the same 8-bit activations as ours.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.errors import BenchmarkError
from benchmarks.format_error import per_row_int4
from benchmarks.plot import load_pyplot
from benchmarks.quality.answers import Prompt, Result, ask
from benchmarks.quality.compare import comparison, summary
from convert.source.checkpoint import INDEX_NAME
from convert.source.config import CONFIG_NAME
from examples.tiny.demo import ENTRYPOINT, DemoError, server, stage_environment
from examples.tiny.fp8 import dequantize_blocks
from examples.tiny.tasks import evaluation_examples
from examples.tiny.tensors import SCALE_SUFFIX
from examples.tiny.train import HELD_OUT_SEED
from examples.tiny.trained import CHECKPOINT, hashes, recipe
from kt_kernel.host.addresses import free_port
from kt_kernel.packed import METHODS

QUESTIONS_PER_TASK = 100
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "accuracy.json"


@dataclass(frozen=True)
class Variant:
    """What is served: the weights' format, the resident experts, and who rounds the experts."""

    name: str
    method: str
    resident: int = 0
    round_experts: Callable[[Tensor], Tensor] | None = None


ORIGINAL = "fp8"
VARIANTS = {
    ORIGINAL: Variant("FP8 original", "int8", resident=16),
    "int8": Variant("INT8", "int8"),
    "int4": Variant("INT4", "int4"),
    "int4-4x8": Variant("INT4, 4 x 8", "int4-4x8"),
    "row-int4": Variant("INT4, one scale a row", "int8", round_experts=per_row_int4),
}


def prompts() -> list[Prompt]:
    """The tiny model's held-out questions."""
    examples = evaluation_examples(HELD_OUT_SEED, QUESTIONS_PER_TASK, recipe()["facts"])
    return [Prompt(f"{e.task}/{i}", e.task, e.question, e.answer) for i, e in enumerate(examples)]


def write_rounded(output: Path, round_experts: Callable[[Tensor], Tensor]) -> None:
    """Write the trained checkpoint in bf16, its routed experts' weights rounded."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(CHECKPOINT, output)
    for shard in sorted(output.glob("*.safetensors")):
        stored = load_file(shard)
        tensors = {}
        for name, tensor in stored.items():
            if name.endswith(SCALE_SUFFIX):
                continue
            scale = stored.get(name + SCALE_SUFFIX)
            value = tensor if scale is None else dequantize_blocks(tensor, scale)
            if ".mlp.experts." in name:
                value = round_experts(value)
            tensors[name] = value if scale is None else value.to(torch.bfloat16)
        save_file(tensors, shard, metadata={"format": "pt"})
    config_path, index_path = output / CONFIG_NAME, output / INDEX_NAME
    config = json.loads(config_path.read_text())
    del config["quantization_config"]
    config_path.write_text(json.dumps(config, indent=2))
    index = json.loads(index_path.read_text())
    kept = {n: f for n, f in index["weight_map"].items() if not n.endswith(SCALE_SUFFIX)}
    index_path.write_text(json.dumps(index | {"weight_map": kept}, indent=2))


def measure(key: str, work: Path) -> list[Result]:
    """Convert, serve and ask one variant; what an earlier run asked is not asked again.

    Raises:
        BenchmarkError: the conversion failed, or the server did not start or answer.
    """
    variant = VARIANTS[key]
    model, weights = CHECKPOINT, work / f"{key}-weights"
    if variant.round_experts is not None:
        model = work / f"{key}-model"
        write_rounded(model, variant.round_experts)
    environment = {
        **{"KT_DEVICE": "cpu", "KT_HOST": "127.0.0.1", "KT_PORT": str(free_port())},
        **{"KT_MODEL_PATH": str(model), "KT_WEIGHT_PATH": str(weights)},
        **{"KT_QUANT_METHOD": variant.method, "KT_METHOD": METHODS[variant.method].kt_method},
        "KT_INPUT_TYPE": "bf16" if variant.round_experts else "fp8",
        "KT_NUM_GPU_EXPERTS": str(variant.resident),
        "KT_RUN_DIR": str(work / f"{key}-run"),
        # float32, as bf16's own rounding would hide differences of formats.
        "KT_EXTRA_ARGS": "--dtype float32 --sleep-on-idle",
    }
    environment = stage_environment(environment)
    # Made anew: they may be of an earlier checkpoint or quantiser.
    shutil.rmtree(weights, ignore_errors=True)
    converted = subprocess.run(
        [sys.executable, str(ENTRYPOINT), "convert"], env=environment, check=False
    )
    if converted.returncode != 0:
        raise BenchmarkError(f"{variant.name}: the conversion failed, see above")
    # Results are taken up again only where the same weights gave them.
    files = sorted(hashes(weights).items() | hashes(model).items())
    layers = [item for item in files if item[0].endswith(".safetensors")]
    digest = hashlib.sha256(repr(layers).encode()).hexdigest()[:12]
    try:
        with server(environment, work / f"{key}.log") as url:
            return ask(url, "DeepSeek-V3.2", prompts(), work / f"{key}-{digest}.jsonl")
    except DemoError as error:
        raise BenchmarkError(f"{variant.name}: {error}") from None


def run(work: Path, only: str | None) -> None:
    """Measure all variants, or one, and write the table's numbers and the picture.

    Raises:
        BenchmarkError: ``only`` names no variant, there is no trained checkpoint, or a stage
            failed.
    """
    if only is not None and only not in VARIANTS:
        raise BenchmarkError(f"--only {only}: expected one of {', '.join(VARIANTS)}")
    if not CHECKPOINT.exists():
        raise BenchmarkError(f"no trained checkpoint in {CHECKPOINT}: run `make tiny`")
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = {key: measure(key, work) for key in VARIANTS if only in (None, key)}
    if only is not None:
        print(comparison({VARIANTS[only].name: summary(results[only], results[only])}))
        return
    rows = {VARIANTS[key].name: summary(results[ORIGINAL], results[key]) for key in VARIANTS}
    print(comparison(rows))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, RESULTS.with_suffix(".png"))


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw accuracy lost and divergence of each variant into a PNG.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    original, *others = rows
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), dpi=110)
    lost = [100 * (rows[original]["accuracy"] - rows[name]["accuracy"]) for name in others]
    left.barh(others, lost)
    left.set_xlim(min(0, *lost), max(1, *lost))  # on a scale of its own, nothing looks like much
    left.set_xlabel("points of task accuracy lost")
    right.barh(others, [rows[name]["KL"] for name in others])
    right.ticklabel_format(style="sci", axis="x", scilimits=(0, 0))
    right.set_yticklabels([])
    right.set_xlabel("KL against FP8, nats a token")
    for axes in (left, right):
        axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
