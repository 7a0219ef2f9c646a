"""Choices that follow from the GPU: attention, requests, chunks, resident experts, KV cache.

The choice of sizes never goes below the tutorial's values while the card holds them. What is left
becomes KV cache up to one context of the model's full length, then resident experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.launch.gpu_memory import GpuMemory, GpuSizes, read_gpu_config
from deploy.settings import tutorial
from deploy.settings.row import AUTO
from deploy.settings.sglang_names import SPARSE_BACKENDS
from kt_kernel.files.units import GIB, in_gib
from kt_kernel.host.gpus import Gpu
from kt_kernel.host.machine import Machine

#: Major compute capabilities for which SGLang has the kernels of V3.2's sparse attention: Hopper
#: and the data centres' Blackwell. Those of workstations (12.x) have neither flashmla nor trtllm.
SPARSE_MAJORS = (9, 10)
BLACKWELL = 10
#: Requests at the same time and tokens of a chunk: the tutorial's, and for cards that cannot hold
#: its number of tokens, too.
SHAPES = ((tutorial.REQUESTS, tutorial.CHUNK), (8, 2048))
#: Weights on the card. Below this a model is a demo's or a test's, and the tutorial's values do.
DEMO_WEIGHTS = 2 * GIB
#: Numbers of tokens are multiples of this.
TOKEN_STEP = 1000


def gpus_used(values: Mapping[str, Any]) -> int:
    """GPUs that share the model; 0 in CPU mode. ``KT_DEVICE`` is not ``auto`` any more."""
    count: int = values["KT_TENSOR_PARALLEL_SIZE"]
    return count if values["KT_DEVICE"] == "cuda" else 0


def dense_attention(values: Mapping[str, Any], machine: Machine) -> tuple[bool, str]:
    """Whether to replace sparse attention by dense attention, and why."""
    backend = values["KT_ATTENTION_BACKEND"]
    if values["KT_DEVICE"] == "cpu":
        return True, "the sparse attention kernels need a GPU"
    if not read_gpu_config(Path(values["KT_MODEL_PATH"])).get("index_topk"):
        return True, "the model has no sparse attention"
    if backend not in (None, AUTO, *SPARSE_BACKENDS):
        return True, f"the attention backend {backend} cannot do sparse attention"
    if machine.gpu is None:
        return True, "there is no GPU to ask for its compute capability"
    major, minor = machine.gpu.compute_capability
    text = f"compute capability {major}.{minor}"
    if major not in SPARSE_MAJORS:
        return True, f"{text}, sparse attention needs 9.x (Hopper) or 10.x (Blackwell B200)"
    return False, f"{text} has the sparse attention kernels"


def attention_backend(values: Mapping[str, Any]) -> tuple[str, str]:
    """The backend that goes with ``KT_DENSE_ATTENTION``, and why."""
    if values["KT_DENSE_ATTENTION"] == "on":
        return "triton", "dense attention runs with it on every card"
    return SPARSE_BACKENDS[0], "it does the model's sparse attention"


def grows_segments(values: Mapping[str, Any], machine: Machine) -> bool:
    """Whether PyTorch's allocator is to take the GPU's memory in segments that grow.

    Else prompts of many lengths leave segments that fit none of the later ones
    (docs/gpu-memory.md). Not where that cannot work or has not been tried: WSL, whose drivers fail
    at it; cards without virtual memory; groups of GPUs, whose processes hand each other memory; and
    with flags whose programs refuse such memory.
    """
    given = [word.partition("=")[0] for word in values["KT_EXTRA_ARGS"] or []]
    # SGLang's parser takes any unambiguous beginning of a flag.
    refused = any(flag.startswith(word) for word in given if len(word) > 2 for flag in _FIXED)
    able = not machine.wsl and (machine.gpu is None or machine.gpu.virtual_memory)
    return able and gpus_used(values) == 1 and not refused


#: Flags of SGLang whose programs do not take memory of segments that grow: torch_memory_saver's,
#: and those that send the KV cache to other servers.
_FIXED = ("--enable-memory-saver", "--disaggregation-mode")


def gpu_sizes(values: Mapping[str, Any], gpu: Gpu) -> GpuSizes:
    """The sizes of the model that these settings name, on cards like this one."""
    config = read_gpu_config(Path(values["KT_MODEL_PATH"]))
    sparse = values["KT_DENSE_ATTENTION"] == "off" and bool(config.get("index_topk"))
    return GpuSizes(
        config,
        sparse=sparse,
        fp8_cache=sparse and gpu.compute_capability[0] >= BLACKWELL,
        gpus=values["KT_TENSOR_PARALLEL_SIZE"],
        multiprocessors=gpu.multiprocessors,
    )


def memory_of(values: Mapping[str, Any], machine: Machine) -> tuple[GpuMemory, float] | None:
    """What the settings take of each GPU and what is free there; None without a GPU."""
    gpu = machine.gpu
    if gpu is None or values["KT_DEVICE"] != "cuda":
        return None
    return gpu_sizes(values, gpu).memory(values, gpu.free_bytes), gpu.free_bytes


def memory_line(values: Mapping[str, Any], machine: Machine) -> str | None:
    """The sum that ``check`` and ``serve`` print; None without a GPU."""
    found = memory_of(values, machine)
    if found is None:
        return None
    each = "each GPU" if values["KT_TENSOR_PARALLEL_SIZE"] > 1 else "GPU"
    return f"memory of {each}: {found[0].line(found[1])}"


@dataclass(frozen=True)
class Sizes:
    """What is chosen for the settings that are ``auto``; the others as they are given.

    Attributes:
        values: name of the setting -> value, in the order in which they follow from each other.
        why: for people.
    """

    values: Mapping[str, int | None]
    why: str


def choose_sizes(values: Mapping[str, Any], machine: Machine) -> Sizes:
    """Requests, tokens of a chunk, resident experts and tokens of the KV cache.

    A card that is too small gets the least that makes sense; the check of its memory then says so.
    """
    experts, tokens = values["KT_NUM_GPU_EXPERTS"], values["KT_MAX_TOTAL_TOKENS"]
    gpu = machine.gpu if values["KT_DEVICE"] == "cuda" else None
    sizes = gpu_sizes(values, gpu) if gpu else None
    if gpu is None or sizes is None or sizes.weights() < DEMO_WEIGHTS:
        why = "the tutorial's value" + (", for a small model" if gpu else ", no GPU to ask")
        usual = {
            **dict(zip(_SHAPE, SHAPES[0], strict=True)),
            "KT_NUM_GPU_EXPERTS": tutorial.EXPERTS,
            "KT_MAX_TOTAL_TOKENS": tutorial.TOKENS,
        }
        return Sizes(_filled(values, usual), why)
    free = gpu.free_bytes

    def room(count: int) -> int:
        """Tokens that fit besides so many experts."""
        left = sizes.cache_room({**values, **shape, "KT_NUM_GPU_EXPERTS": count}, free)
        return int(left / sizes.cache_per_token / TOKEN_STEP) * TOKEN_STEP

    wanted = tutorial.TOKENS if tokens == AUTO else tokens or 0
    for candidate in SHAPES:
        shape = _filled(values, dict(zip(_SHAPE, candidate, strict=True)))
        if room(0 if experts == AUTO else experts) >= wanted:
            break
    chosen = experts
    if experts == AUTO:
        chosen = tutorial.EXPERTS if room(tutorial.EXPERTS) >= wanted else 0
    if tokens == AUTO:
        most = max(tutorial.TOKENS, int(sizes.config["max_position_embeddings"]))
        least = shape["KT_CHUNKED_PREFILL_SIZE"] or 0
        tokens = wanted = max(least, min(room(chosen), most))
    if experts == AUTO and tokens is not None:
        limit = int(sizes.config["n_routed_experts"])
        while chosen < limit and room(chosen + 1) >= wanted:
            chosen += 1
    return Sizes(
        {**shape, "KT_NUM_GPU_EXPERTS": chosen, "KT_MAX_TOTAL_TOKENS": tokens},
        f"{in_gib(free)} GiB of {gpu.name} are free",
    )


_SHAPE = ("KT_MAX_RUNNING_REQUESTS", "KT_CHUNKED_PREFILL_SIZE")


def _filled(values: Mapping[str, Any], chosen: Mapping[str, int]) -> dict[str, int | None]:
    """Given values, and the chosen ones for those that are ``auto``."""
    return {name: new if values[name] == AUTO else values[name] for name, new in chosen.items()}
