"""Checks of the GPU, its driver and its memory."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from deploy.checks.result import Finding, Status, fail_unless
from deploy.checks.situation import Situation, check
from deploy.launch.by_card import choose_sizes, gpus_used, memory_of
from deploy.launch.gpu_memory import GpuMemory
from deploy.settings.row import AUTO
from kt_kernel.files.units import GIB, in_gib
from kt_kernel.host.gpus import Gpu

#: The FP8 weights of attention need it: Ampere runs them through Marlin's kernels.
LEAST_CAPABILITY = (8, 0)


@check("gpu")
def check_device(situation: Situation) -> Iterator[Finding]:
    """A GPU if the settings want one."""
    machine, device = situation.machine, situation.values["KT_DEVICE"]
    if machine.gpu_problem:
        yield Finding(
            Status.FAIL if device == "cuda" else Status.WARN,
            "a working NVIDIA GPU",
            machine.gpu_problem,
            "install the driver (in a container: the NVIDIA container toolkit), or set "
            "KT_DEVICE=cpu to do without, slowly",
        )
    elif machine.gpu is None:
        yield fail_unless(
            device != "cuda",
            "an NVIDIA GPU" if device == "cuda" else "nothing in CPU mode",
            "no GPU",
            "set KT_DEVICE=cpu to run without one, slowly",
        )
    else:
        gpu = machine.gpu
        capability = ".".join(map(str, gpu.compute_capability))
        wanted = max(1, gpus_used(situation.values))
        enough = gpu.count >= wanted
        yield fail_unless(
            enough,
            "an NVIDIA GPU" if wanted == 1 else f"{wanted} NVIDIA GPUs",
            (f"{gpu.count} x " if gpu.count > 1 or not enough else "")
            + f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, compute capability {capability}, "
            f"driver for CUDA {gpu.cuda_version[0]}.{gpu.cuda_version[1]}",
            f"set KT_TENSOR_PARALLEL_SIZE={gpu.count} or let CUDA_VISIBLE_DEVICES show more",
        )


@check("compute-capability")
def check_compute_capability(situation: Situation) -> Iterator[Finding]:
    """The card has the instructions that FP8 weights need."""
    gpu = situation.machine.gpu
    if gpu is None or situation.values["KT_DEVICE"] != "cuda":
        return
    enough = gpu.compute_capability >= LEAST_CAPABILITY
    yield fail_unless(
        enough,
        f"at least {_dotted(LEAST_CAPABILITY)} (Ampere) for FP8 weights",
        f"{_dotted(gpu.compute_capability)}, {gpu.name}",
        "choose a newer card by CUDA_VISIBLE_DEVICES, or set KT_DEVICE=cpu",
    )


@check("driver")
def check_driver(situation: Situation) -> Iterator[Finding]:
    """The driver runs the CUDA that torch was built for, any minor version of it."""
    gpu = situation.machine.gpu
    if gpu is None or situation.values["KT_DEVICE"] != "cuda":
        return
    needed = torch_cuda_version()
    if needed is None:
        return  # no torch, or one without CUDA: the check of the packages tells
    enough = gpu.cuda_version[0] >= needed[0]
    driver = f" (version {gpu.driver})" if gpu.driver else ""
    yield fail_unless(
        enough,
        f"a driver for CUDA {needed[0]}, as the installed torch is built for {_dotted(needed)}",
        f"one for CUDA {_dotted(gpu.cuda_version)}{driver}",
        "update the NVIDIA driver of the host",
    )


def torch_cuda_version() -> tuple[int, int] | None:
    """The CUDA version that torch was built for, without importing torch; None without CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


@check("vram", sized=True)
def check_gpu_memory(situation: Situation) -> Iterator[Finding]:
    """Weights, KV cache and workspace fit onto the card, besides what other programs have there."""
    gpu, values = situation.machine.gpu, situation.values
    found = memory_of(values, situation.machine)
    if gpu is None or found is None:
        return
    memory, free = found
    enough = memory.total <= free or situation.serving
    yield fail_unless(
        enough,
        f"{in_gib(memory.total)} GiB free on each GPU for {situation.needs.what}",
        f"{in_gib(free)} of {in_gib(gpu.memory_bytes)} GiB"
        + ("" if gpu.used_bytes is not None else " (what is in use is not known)")
        + (" beside the server that runs" if situation.serving else ""),
        "" if enough else _what_fits(situation, gpu, memory),
    )


def _what_fits(situation: Situation, gpu: Gpu, memory: GpuMemory) -> str:
    """What to do about a card that cannot hold what the settings ask for."""
    if memory.total <= gpu.memory_bytes:
        return "end the programs that nvidia-smi lists"
    names = choose_sizes(situation.values, situation.machine).values
    chosen = {**situation.values, **dict.fromkeys(names, AUTO)}
    chosen |= choose_sizes(chosen, situation.machine).values
    fits = memory_of(chosen, situation.machine)
    if fits is not None and fits[0].total <= fits[1]:
        changed = [name for name in names if chosen[name] != situation.values[name]]
        shown = " ".join(f"{name}={chosen[name]}" for name in changed)
        return f"set {shown}, which fit, or leave {'them' if changed[1:] else 'it'} to auto"
    return "raise KT_TENSOR_PARALLEL_SIZE if there are more GPUs, or use a larger card"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
