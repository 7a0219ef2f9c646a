"""Checks of memory, disks and the limits of the process against what the model needs."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from deploy.checks.result import Finding, Status, fail_unless, warn_unless
from deploy.checks.situation import Situation, check
from deploy.hub.marker import marker_or_none
from deploy.hub.unfinished import bytes_present
from deploy.state import run_directory
from kt_kernel.files.folders import nearest_existing
from kt_kernel.files.units import gigabytes
from kt_kernel.host import limits as host_limits
from kt_kernel.host import memory as host_memory
from kt_kernel.host.limits import home_problem
from kt_kernel.host.memory import huge_page_mode

#: NCCL's and torch's shared memory for several GPUs; with one, little is used.
SHM_BYTES = 1 << 30
SMALL_SHM_BYTES = 32 << 20


@check("memory", sized=True)
def check_memory(situation: Situation) -> Iterator[Finding]:
    """The experts and the server fit into memory: the kernel holds all weights at once."""
    memory, needs = situation.memory, situation.needs
    needed = needs.memory(situation.values)
    expected = f"{gigabytes(needed)} of memory for {needs.what}"
    limited = memory.limit is not None and memory.limit < memory.total
    usable = memory.limit if memory.limit is not None and limited else memory.total
    found = gigabytes(usable) + (
        f" granted by the control group, of {gigabytes(memory.total)}" if limited else ""
    )
    if usable < needed:
        raise_limit = limited and memory.total >= needed
        todo = "raise the container's memory limit" if raise_limit else "add memory"
        todo += ", or serve a smaller model"
        for name in ("KT_MAX_TOTAL_TOKENS", "KT_CHUNKED_PREFILL_SIZE"):
            share = needed - needs.memory({**situation.values, name: 0})
            if share > needed / 2 or needed - share <= usable:
                todo = f"lower {name}, which takes {gigabytes(share)} of it"
        yield Finding(Status.FAIL, expected, found, todo)
    elif memory.available < needed:
        yield Finding(
            Status.WARN,
            expected,
            f"{found}, of which {gigabytes(memory.available)} are free",
            "end other programs: what does not fit ends the server",
        )
    else:
        yield Finding(Status.PASS, expected, found)


@check("numa-memory", sized=True)
def check_numa_memory(situation: Situation) -> Iterator[Finding]:
    """Each NUMA node holds its threads' share of the experts.

    A pool's weights lie on its own node, so what does not fit there is read from another socket.
    One pool's lie wherever its threads run and there is room; what that costs, the check of the
    threads says.
    """
    nodes = situation.memory.nodes
    pools: int = situation.values["KT_THREADPOOL_COUNT"]
    if len(nodes) < 2 or pools < 2:
        return  # the check of the memory tells
    share = situation.needs.weights(situation.values) / pools
    in_turn = list(nodes)
    needed = Counter(in_turn[pool % len(nodes)] for pool in range(pools))
    short = [node for node, count in needed.items() if nodes[node] < count * share]
    if len(set(needed.values())) == 1:
        each = f"{gigabytes(share * pools / len(needed))} on each of {len(needed)} NUMA nodes"
    else:
        each = ", ".join(f"{gigabytes(c * share)} on node {node}" for node, c in needed.items())
    yield warn_unless(
        not short,
        f"{each} for {situation.needs.what}",
        ", ".join(f"node {node}: {gigabytes(total)}" for node, total in nodes.items()),
        "spread the memory modules evenly: the rest is read through the slower link between the "
        "sockets",
    )


@check("memory-policy")
def check_memory_policy(situation: Situation) -> Iterator[Finding]:
    """This process may bind memory to NUMA nodes (mbind)."""
    error = host_memory.memory_policy_error()
    matters = situation.machine.numa_nodes > 1
    found = "that it may" if error == 0 else f"{errno.errorcode.get(error, str(error))} from mbind"
    yield warn_unless(
        not (error and matters),
        "that the process may bind memory to NUMA nodes"
        if matters
        else "nothing with one NUMA node",
        found,
        "in a container, add the capability SYS_NICE (cap_add); until then memory lies where it "
        "is first touched",
    )


@check("overcommit", sized=True)
def check_overcommit(situation: Situation) -> Iterator[Finding]:
    """A kernel that never overcommits still has what the server allocates."""
    left = situation.memory.commit_left
    if left is None:
        return
    needed = situation.needs.memory(situation.values)
    enough = left >= needed
    yield fail_unless(
        enough,
        f"{gigabytes(needed)} to allocate with vm.overcommit_memory=2",
        gigabytes(max(left, 0)),
        "set vm.overcommit_memory=0, or raise vm.overcommit_ratio",
    )


@check("memlock")
def check_locked_memory(situation: Situation) -> Iterator[Finding]:
    """Memory may be locked where that is of use: for NCCL between several GPUs."""
    limit = host_limits.locked_memory_limit()
    matters = situation.values["KT_TENSOR_PARALLEL_SIZE"] > 1 and limit is not None
    yield warn_unless(
        not matters,
        "no limit of locked memory with several GPUs",
        "no limit"
        if limit is None
        else gigabytes(limit) + ("" if matters else ", which is enough here"),
        "raise it: ulimit -l unlimited, or ulimits: memlock: -1 of the container",
    )


@check("pinned-memory")
def check_pinned_memory(situation: Situation) -> Iterator[Finding]:
    """CUDA registers the experts' memory, so that prompts' experts reach the card at full speed.

    Its driver for Linux asks the kernel for the pages by itself and looks at no limit of locked
    memory: ``os_lock_user_pages`` of the open kernel modules, and tried with a limit of 64 KiB
    (docs/performance.md). WSL has no such driver, and NVIDIA lists limited pinned memory among its
    known limitations.
    """
    values = situation.values
    in_use = values["KT_DEVICE"] == "cuda" and situation.machine.gpu is not None
    if not in_use or values["KT_GPU_PREFILL_TOKEN_THRESHOLD"] is None:
        return
    release = host_limits.kernel_release(situation.root)
    in_wsl = host_limits.is_wsl(release)
    yield warn_unless(
        not in_wsl,
        "that CUDA registers the experts' memory, for those of prompts that stream to the GPU",
        f"WSL (kernel {release}), which lets CUDA pin little memory"
        if in_wsl
        else "Linux, whose driver does so at any limit of locked memory",
        "they go through staging buffers then, at a third of the speed, so prompts of thousands of "
        "tokens take about 1.5 times as long; on a Linux without WSL they do not",
    )


@check("huge-pages")
def check_huge_pages(situation: Situation) -> Iterator[Finding]:
    """The kernel may back the weights with huge pages, for which the program asks."""
    mode = huge_page_mode(situation.root)
    good = mode in ("always", "madvise") or situation.is_small
    yield warn_unless(
        good,
        "transparent huge pages in mode madvise or always",
        f"mode {mode}" if mode else "a kernel without them",
        "on the host: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; without, "
        "every few rows of weights cost an address lookup",
    )


@check("shm")
def check_shared_memory(situation: Situation) -> Iterator[Finding]:
    """/dev/shm is there and large enough for the server's processes."""
    several = situation.values["KT_TENSOR_PARALLEL_SIZE"] > 1
    needed = SHM_BYTES if several else SMALL_SHM_BYTES
    size, writable = host_memory.shared_memory(situation.root)
    expected = f"at least {gigabytes(needed)} in /dev/shm"
    if not writable:
        yield Finding(
            Status.FAIL,
            expected,
            "that it cannot be written" if size else "none",
            "mount a tmpfs there, or set the container's shm_size",
        )
        return
    enough = size >= needed
    yield warn_unless(enough, expected, gigabytes(size), "raise the container's shm_size")


@check("disk", serve=False, sized=True)
def check_disk(situation: Situation) -> Iterator[Finding]:
    """Room for what is still to be downloaded and converted, also when both share a disk."""
    remaining = (
        ("KT_MODEL_PATH", situation.model_path, bytes_to_download(situation)),
        ("KT_WEIGHT_PATH", situation.weight_path, bytes_to_convert(situation)),
    )
    devices = [nearest_existing(path).stat().st_dev for _, path, _ in remaining]
    shared = devices[0] == devices[1] and all(needed > 0 for _, _, needed in remaining)
    together = sum(needed for _, _, needed in remaining) if shared else 0.0
    for name, path, needed in remaining:
        free = shutil.disk_usage(nearest_existing(path)).free
        expected = f"{gigabytes(needed)} free for {situation.needs.what} in {name} {path}"
        if shared:
            expected += f", {gigabytes(together)} with the other on the same disk"
        if needed <= 0:
            yield Finding(Status.PASS, f"all files in {name} {path}", "nothing to write")
        else:
            enough = free >= max(needed, together)
            yield fail_unless(
                enough, expected, f"{gigabytes(free)} free", "free some or choose another disk"
            )


def bytes_to_download(situation: Situation) -> float:
    """Bytes of the model that are not on the disk yet."""
    path = situation.model_path
    marker = marker_or_none(path)
    if marker is not None and marker.files:
        return marker.total_bytes - bytes_present(path, marker.files)
    present = _bytes_in(path, "*.safetensors")
    # A model that came another way counts as whole once it has the index's size.
    return max(0.0, situation.needs.download - present)


def bytes_to_convert(situation: Situation) -> float:
    """Bytes of the packed weights that are not on the disk yet."""
    whole = situation.needs.packed[situation.values["KT_QUANT_METHOD"]]
    return max(0.0, whole - _bytes_in(situation.weight_path, "layer-*.safetensors"))


@check("run-dir", serve=False)
def check_run_directory(situation: Situation) -> Iterator[Finding]:
    """The stages can say what they are doing."""
    directory = run_directory(situation.values["KT_RUN_DIR"])
    folder = nearest_existing(directory)
    writable = os.access(folder, os.W_OK)
    yield warn_unless(
        writable,
        f"a KT_RUN_DIR {directory} that can be written",
        "one" if writable else f"that user {os.getuid()} cannot write to {folder}",
        "set KT_RUN_DIR, or `health` knows nothing",
    )


@check("home")
def check_home(situation: Situation) -> Iterator[Finding]:
    """SGLang's libraries keep compiled kernels below the home directory, and end without one."""
    problem = home_problem()
    yield fail_unless(
        not problem,
        "a home directory for the caches of SGLang's libraries",
        problem or str(Path.home()),
        "set HOME to a directory that can be written",
    )


def _bytes_in(path: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in path.glob(pattern)) if path.is_dir() else 0
