"""``python -m benchmarks.rehearsal``: make, serve, ask, fit, answer, and leave nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.errors import BenchmarkError
from benchmarks.host_description import describe
from benchmarks.plot import load_pyplot
from benchmarks.rehearsal import checkpoint, packed_layers, plan, result, variant
from benchmarks.rehearsal.plot import draw
from benchmarks.rehearsal.sizes import MOE_LAYERS, with_moe_layers
from benchmarks.rehearsal.workspace import workspaces
from benchmarks.server import REPOSITORY
from deploy.launch.argv import resolve
from deploy.settings.config import load
from deploy.settings.table import TABLE
from examples.tiny.tokenizer import build_tokenizer, write_tokenizer
from kt_kernel.errors import UserError
from kt_kernel.host.machine import survey
from kt_kernel.host.memory import read_memory
from kt_kernel.packed import METHODS, PackedLayout

CACHE = REPOSITORY / ".cache" / "rehearsal"
PROMPTS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
REQUESTS = (1, 4, 8, 16, 32)
PROMPTS_ON_CPU, REQUESTS_ON_CPU = (32, 128), (1, 2)
#: Seconds of reads before the servers and after each.
READ_SECONDS = 3.0
Reads = dict[str, limits.Measured]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal",
        description="Serve the first MoE layers of V3.2 with random weights; say what all will do.",
    )
    add = parser.add_argument
    add("--layers", default="auto", help="auto (what the machine holds), the most, or N,N,N")
    add("--check", type=int, metavar="N", help="serve N, too, and compare the others' line there")
    add("--method", choices=METHODS, default="int4", help="format of the experts (int4)")
    add("--resident", type=int, default=1, help="experts of each layer on the GPU (1)")
    add("--cpu", action="store_true", help="without a GPU, also where there is one")
    add("--prompts", type=int, nargs="*", help=f"tokens ({' '.join(map(str, PROMPTS))})")
    add("--requests", type=int, nargs="+", help=f"that decode ({' '.join(map(str, REQUESTS))})")
    add("--rounds", type=int, default=3, help="of each measurement (3)")
    add("--soak", type=float, default=0, help="minutes under load, of the most layers (0)")
    add("--own-files", action="store_true", help="a file for each layer, not one for all")
    add("--interference", action="store_true", help="a long prompt beside running answers, too")
    add("--no-profile", action="store_true", help="do not take a decode step apart")
    add("--folder", type=Path, help="for the files; default: memory (/dev/shm), else .cache")
    add("--memory", type=float, help="GB of memory there are, where the kernel tells too little")
    add("--json", type=Path, help="write the results there")
    add("--plot", type=Path, help="draw them there, a PNG")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when measured, 2 with one clear error, 130 after Ctrl-C."""
    args = _parse(argv)
    try:
        found = rehearse(args)
    except (BenchmarkError, UserError, RuntimeError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left", file=sys.stderr)
        return 130
    print("\n".join(result.answer(found)))
    if args.json:
        _write(args.json, found)
        _partial(args.json).unlink(missing_ok=True)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(found, args.plot)
    if problem := found.get("check", {}).get("error"):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _partial(path: Path) -> Path:
    """Where the servers measured so far are written."""
    return path.with_name(path.name + ".partial")


def rehearse(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; the results, for JSON.

    Raises:
        BenchmarkError: something is missing, or does not fit.
        RuntimeError: a server did not start.
    """
    here = survey()
    if here.gpu_problem and not args.cpu:
        raise BenchmarkError(f"{here.gpu_problem}: repair that, or rehearse without it (--cpu)")
    gpu = None if args.cpu else here.gpu
    if args.rounds < 1 or not 0 <= args.resident < 256:
        raise BenchmarkError("--rounds and --resident: expected at least 1, and 0 to 255")
    _need_sglang()
    if args.plot:
        load_pyplot()  # in hours it would be too late to say that it is missing
    folders = [args.folder] if args.folder else [plan.TMPFS, _cache()]
    memory = plan.usable_memory(read_memory()) if args.memory is None else args.memory * 1e9
    room = plan.Machine(memory, plan.free_disks(folders), gpu)
    settings = {
        "KT_CPUINFER": "auto",
        "KT_THREADPOOL_COUNT": "auto",
        "KT_DEVICE": "cuda" if gpu else "cpu",
        "KT_METHOD": METHODS[args.method].kt_method,
        "KT_QUANT_METHOD": args.method,
        "KT_NUM_GPU_EXPERTS": str(args.resident),
    }
    if args.memory is not None:
        ignored = os.environ.get("KT_IGNORE_CHECKS", "")
        settings["KT_IGNORE_CHECKS"] = ",".join(filter(None, [ignored, "memory"]))
    values = _values(settings)
    served = plan.Model(args.method, args.resident, values, not args.own_files)
    chosen = plan.choose(args.layers, room, served, args.check)
    with workspaces([chosen.folder, chosen.packed]) as (folder, packed_in):
        reads: Reads = {}
        _read("before", here.usable_cpus, reads)
        where = f"{folder} and {packed_in}" if packed_in != folder else f"{folder}"
        more = f" and {chosen.check} to check the line" if chosen.check else ""
        variant.say(f"{_list(chosen.counts)} MoE layers{more}, files in {where}")
        files = _make(args, chosen, folder, packed_in)
        servers, check = _serve(args, chosen, settings, files, here.usable_cpus, reads)
    found: dict[str, Any] = {
        "schema": result.SCHEMA,
        "kind": result.KIND,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks.rehearsal", *sys.argv[1:]]),
        "machine": describe(),
        "card": gpu.name if gpu else None,
        "versions": {name: importlib.metadata.version(name) for name in ("sglang", "torch")},
        "threads": values["KT_CPUINFER"],
        "method": args.method,
        "resident": args.resident,
        "settings": _changed_settings(settings),
        "reads GB/s": {when: vars(rate) for when, rate in reads.items()},
        "one_file": served.one_file,
        "servers": servers,
    }
    if check:
        found["check"] = check
    if args.memory is not None:
        found["machine"]["memory_bytes"] = int(memory)
    if gpu:
        found["card_memory"] = {
            "free": float(gpu.free_bytes),
            "computed": result.computed_card_bytes(MOE_LAYERS, values, gpu),
            "computed_here": result.computed_card_bytes(
                result.largest(found)["layers"], values, gpu
            ),
        }
    return result.derive(found)


@dataclass(frozen=True)
class Files:
    """What was made of the largest model.

    Attributes:
        folder: for the views of fewer layers.
        shards: files of the checkpoint.
        layers: files of the packed layers.
        layout: of one of these.
        only: the layer whose file stands for all; None if each has its own.
    """

    folder: Path
    shards: Path
    layers: Path
    layout: PackedLayout
    only: int | None

    def view(self, count: int, resident: int) -> tuple[Path, dict[str, str]]:
        """A folder with the first ``count`` MoE layers, and the environment that serves it."""
        view = self.folder / f"view-{count}"
        model, weights, run = view / "model", view / "weights", view / "run"
        checkpoint.write_view(model, self.shards, with_moe_layers(count), resident)
        write_tokenizer(model, build_tokenizer(1024))
        packed_layers.write_view(weights, self.layers, model, self.layout, self.only)
        run.mkdir()
        environment = {} if self.only is None else packed_layers.one_file(self.only)
        environment |= {"KT_MODEL_PATH": str(model), "KT_WEIGHT_PATH": str(weights)}
        return view, environment | {"KT_RUN_DIR": str(run)}


def _make(args: argparse.Namespace, chosen: plan.Plan, folder: Path, packed_in: Path) -> Files:
    """Write the files of the most layers, in folders that are there."""
    started = time.monotonic()
    most = with_moe_layers(chosen.most)
    layout = plan.v32_layout(args.method)
    shards, layers = folder / "shards", packed_in / "layers"
    shards.mkdir()
    layers.mkdir()
    numbers = list(most.moe_layers)
    only = None if args.own_files else numbers[0]
    try:
        checkpoint.write_shards(shards, most, args.resident)
        packed_layers.write_layers(layers, layout, numbers if only is None else [only])
    except OSError as error:
        raise BenchmarkError(f"cannot write to {folder}: {error.strerror}") from None
    variant.say(f"made the files in {time.monotonic() - started:.0f} s")
    return Files(folder, shards, layers, layout, only)


def _serve(
    args: argparse.Namespace,
    chosen: plan.Plan,
    settings: Mapping[str, str],
    files: Files,
    cpus: int,
    reads: Reads,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Measure each number of layers, and after each the read bandwidth; the check's apart."""
    on_cpu = settings["KT_DEVICE"] == "cpu"
    defaults = (PROMPTS_ON_CPU, REQUESTS_ON_CPU) if on_cpu else (PROMPTS, REQUESTS)
    questions = variant.Questions(
        prompts=tuple(defaults[0] if args.prompts is None else args.prompts),
        requests=tuple(args.requests or defaults[1]),
        rounds=args.rounds,
        profile=not args.no_profile and not on_cpu,
        interference=args.interference,
    )
    servers: list[dict[str, Any]] = []

    def measure(count: int) -> dict[str, Any]:
        try:
            view, environment = files.view(count, args.resident)
        except OSError as error:
            raise BenchmarkError(f"cannot write to {files.folder}: {error.strerror}") from None
        asked = replace(questions, soak=args.soak if count == chosen.most else 0.0)
        found = variant.measure(count, {**settings, **environment}, asked, view)
        _read(f"after {count}", cpus, reads)
        return found

    # The largest first: it says most if a later one fails.
    for count in reversed(chosen.counts):
        servers.insert(0, measure(count))
        if args.json:  # if the next one fails, this is not lost
            _write(_partial(args.json), {"servers": servers[::-1]})
    if chosen.check is None:
        return servers, None
    try:
        return servers, measure(chosen.check)
    except (BenchmarkError, RuntimeError, TimeoutError) as error:  # the line does not need it
        return servers, {"layers": chosen.check, "error": str(error)}


def _read(when: str, cpus: int, reads: Reads) -> None:
    """Measure the read bandwidth once more, which on a shared machine changes by the minute."""
    reads[when] = found = limits.read_bandwidth(cpus, READ_SECONDS)
    variant.say(f"reads {found.best:.1f} GB/s")


def _changed_settings(own: Mapping[str, str]) -> dict[str, str]:
    """Settings of the environment that reach the servers, which this command does not choose."""
    return {
        setting.name: os.environ[setting.name]
        for setting in TABLE
        if setting.name in os.environ and setting.name not in own and not setting.secret
    }


def _values(settings: Mapping[str, str]) -> dict[str, Any]:
    """The settings as ``serve`` will resolve them."""
    env_file = REPOSITORY / "env" / "tutorial.env"
    config = load({**os.environ, **settings}, [env_file], "serve")
    return resolve(config, survey())[0]


def _need_sglang() -> None:
    try:
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise BenchmarkError("SGLang is missing: run `make venv`") from None


def _cache() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def _list(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


if __name__ == "__main__":
    sys.exit(main())
