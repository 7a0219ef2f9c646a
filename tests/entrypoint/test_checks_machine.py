"""Checks of memory, disks, CPU and GPU on made-up machines."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import checks_cpu, checks_gpu, checks_machine
from deploy.argv import resolve
from deploy.checks import Check, Entry, Result, Situation, Status, all_checks, run_checks
from deploy.config import load
from deploy.machine import Gpu, Machine
from deploy.marker import Marker, RepoFile
from deploy.settings import CHECK_NAMES
from tests.entrypoint.fake_machine import GIB, host, write
from tests.entrypoint.helpers import H200, L20, LAPTOP, Prepared, run, with_gpu, without_home

SERVER = with_gpu(L20)


def situation(root: Path, machine: Machine = SERVER, /, **settings: str) -> Situation:
    settings = {"KT_MODEL_PATH": "/no/model", "KT_WEIGHT_PATH": "/no/weights", **settings}
    config = load(settings)
    values, _ = resolve(config, machine)
    return Situation(values, config.environment, machine, root)


def one(check: Check, root: Path, machine: Machine = SERVER, /, **settings: str) -> Result:
    """The only result of a check; it says what to do unless it passes."""
    (result,) = check(situation(root, machine, **settings))
    assert (result.todo == "") == (result.status is Status.PASS), result
    assert "\n" not in result.sentence()
    return result


def tiny(prepared: Prepared) -> dict[str, str]:
    return {"KT_MODEL_PATH": str(prepared.model), "KT_WEIGHT_PATH": str(prepared.int4)}


# ---- memory --------------------------------------------------------------------------------------


def test_enough_memory(tmp_path: Path) -> None:
    result = one(checks_machine.check_memory, host(tmp_path, 512), KT_NUM_GPU_EXPERTS="1")
    assert result.status is Status.PASS
    assert result.expected == "340.9 GB of memory for V3.2 (the model is not there yet)"


def test_too_little_memory(tmp_path: Path, prepared: Prepared) -> None:
    result = one(checks_machine.check_memory, host(tmp_path, 256))
    assert (result.status, result.found) == (Status.FAIL, "274.9 GB")
    assert one(checks_machine.check_memory, tmp_path, **tiny(prepared)).status is Status.PASS
    assert one(checks_machine.check_memory, host(tmp_path, 2), **tiny(prepared)).status == "FAIL"


def test_a_containers_memory_limit(tmp_path: Path) -> None:
    host(tmp_path, 512)
    write(tmp_path, {"sys/fs/cgroup/memory.max": str(64 * GIB)})
    result = one(checks_machine.check_memory, tmp_path)
    assert result.status is Status.FAIL
    assert result.found == "68.7 GB granted by the control group, of 549.8 GB"
    assert result.todo.startswith("raise the container's memory limit")


def test_memory_in_use(tmp_path: Path) -> None:
    result = one(checks_machine.check_memory, host(tmp_path, 512, MemAvailable=100))
    assert result.status is Status.WARN
    assert "107.4 GB are free" in result.found


def test_memory_of_numa_nodes(tmp_path: Path) -> None:
    result = one(checks_machine.check_numa_memory, host(tmp_path, 512))
    assert result.status is Status.PASS
    assert result.expected.startswith("168.8 GB on each of 2 NUMA nodes")
    assert result.found == "node 0: 274.9 GB, node 1: 274.9 GB"
    uneven = "Node 1 MemTotal:  100000000 kB\n"
    write(tmp_path, {"sys/devices/system/node/node1/meminfo": uneven})
    assert one(checks_machine.check_numa_memory, tmp_path).status is Status.WARN
    single = situation(host(tmp_path / "b", nodes=1))
    assert list(checks_machine.check_numa_memory(single)) == []


def test_memory_of_numa_nodes_with_other_numbers_of_pools(tmp_path: Path) -> None:
    """One pool has no node of its own; of three, two share the first node."""
    host(tmp_path, 512)
    alone = situation(tmp_path, KT_THREADPOOL_COUNT="1")
    assert list(checks_machine.check_numa_memory(alone)) == []
    three = situation(tmp_path, KT_THREADPOOL_COUNT="3", KT_CPUINFER="3")
    (result,) = checks_machine.check_numa_memory(three)
    assert result.expected.startswith("225.0 GB on node 0, 112.5 GB on node 1 for")
    assert result.status is Status.PASS


def test_no_overcommit(tmp_path: Path) -> None:
    assert list(checks_machine.check_overcommit(situation(host(tmp_path)))) == []
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    host_with_limit = host(tmp_path, 512, CommitLimit=400, Committed_AS=100)
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    assert one(checks_machine.check_overcommit, host_with_limit).status is Status.FAIL
    host(tmp_path, 512, CommitLimit=500, Committed_AS=100)
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    assert one(checks_machine.check_overcommit, tmp_path).status is Status.PASS


def test_memory_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.limits.memory_policy_error", lambda: errno.EPERM)
    result = one(checks_machine.check_memory_policy, tmp_path)
    assert (result.status, result.found) == (Status.WARN, "EPERM from mbind")
    assert "SYS_NICE" in result.todo
    assert one(checks_machine.check_memory_policy, tmp_path, LAPTOP).status is Status.PASS
    monkeypatch.setattr("deploy.limits.memory_policy_error", lambda: 0)
    assert one(checks_machine.check_memory_policy, tmp_path).status is Status.PASS


def test_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.limits.locked_memory_limit", lambda: 8 << 20)
    result = one(checks_machine.check_locked_memory, tmp_path)
    assert (result.status, result.found) == (Status.PASS, "8.4 MB, which is enough here")
    several = {"KT_TENSOR_PARALLEL_SIZE": "2"}
    result = one(checks_machine.check_locked_memory, tmp_path, **several)
    assert (result.status, result.found) == (Status.WARN, "8.4 MB")
    monkeypatch.setattr("deploy.limits.locked_memory_limit", lambda: None)
    result = one(checks_machine.check_locked_memory, tmp_path, **several)
    assert (result.status, result.found) == (Status.PASS, "no limit")


def test_huge_pages(tmp_path: Path, prepared: Prepared) -> None:
    assert one(checks_machine.check_huge_pages, host(tmp_path)).status is Status.PASS
    write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"})
    result = one(checks_machine.check_huge_pages, tmp_path)
    assert (result.status, result.found) == (Status.WARN, "mode never")
    assert one(checks_machine.check_huge_pages, tmp_path, **tiny(prepared)).status is Status.PASS
    assert one(checks_machine.check_huge_pages, tmp_path / "no").found == "a kernel without them"


@pytest.mark.parametrize(
    ("size", "writable", "gpus", "status"),
    [
        (64 << 20, True, "1", Status.PASS),
        (16 << 20, True, "1", Status.WARN),
        (64 << 20, True, "2", Status.WARN),
        (1 << 30, True, "2", Status.PASS),
        (1 << 30, False, "1", Status.FAIL),
        (0, False, "1", Status.FAIL),
    ],
)
def test_shared_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    writable: bool,
    gpus: str,
    status: Status,
) -> None:
    monkeypatch.setattr("deploy.limits.shared_memory", lambda _: (size, writable))
    check = checks_machine.check_shared_memory
    assert one(check, tmp_path, KT_TENSOR_PARALLEL_SIZE=gpus).status is status


# ---- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def free_space(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def set_free(free: float) -> None:
        usage = SimpleNamespace(total=free, used=0, free=int(free))
        monkeypatch.setattr("deploy.checks_machine.shutil.disk_usage", lambda _: usage)

    return set_free


def test_disks_for_v32(tmp_path: Path, free_space: Callable[[float], None]) -> None:
    here = {"KT_MODEL_PATH": str(tmp_path / "m"), "KT_WEIGHT_PATH": str(tmp_path / "w")}
    free_space(1.1e12)
    results = list(checks_machine.check_disk(situation(tmp_path, **here)))
    assert [r.status for r in results] == [Status.PASS, Status.PASS]
    assert "KT_MODEL_PATH" in results[0].expected
    free_space(0.9e12)  # enough for each, but they share the disk
    results = list(checks_machine.check_disk(situation(tmp_path, **here)))
    assert [r.status for r in results] == [Status.FAIL, Status.FAIL]
    assert "1026.5 GB with the other on the same disk" in results[1].expected


def test_a_finished_model_needs_no_room(
    tmp_path: Path, prepared: Prepared, free_space: Callable[[float], None]
) -> None:
    free_space(0)
    results = list(checks_machine.check_disk(situation(tmp_path, **tiny(prepared))))
    assert [(r.status, r.found) for r in results] == [(Status.PASS, "nothing to write")] * 2


def test_what_is_still_to_be_written(
    tmp_path: Path, prepared: Prepared, free_space: Callable[[float], None]
) -> None:
    weights = Path(shutil.copytree(prepared.int4, tmp_path / "w"))
    layer = sorted(weights.glob("layer-*"))[0]
    size = layer.stat().st_size
    layer.unlink()
    here = {**tiny(prepared), "KT_WEIGHT_PATH": str(weights)}
    # The headers of the files are not part of the sizes that are computed.
    assert checks_machine.bytes_to_convert(situation(tmp_path, **here)) == pytest.approx(
        size, rel=0.01
    )
    free_space(size / 2)
    results = list(checks_machine.check_disk(situation(tmp_path, **here)))
    assert [r.status for r in results] == [Status.PASS, Status.FAIL]


def test_an_unfinished_download_counts_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(100_000))
    files = {name: RepoFile(100_000, "", "") for name in ("a.safetensors", "b.safetensors")}
    Marker("lab/small", "main", "1" * 40, files).save(tmp_path)
    here = situation(tmp_path, KT_MODEL_PATH=str(tmp_path))
    assert checks_machine.bytes_to_download(here) == 100_000


def test_a_volume_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.checks_machine.os.access", lambda *_: False)
    here = situation(tmp_path, KT_MODEL_PATH=str(tmp_path), KT_WEIGHT_PATH=str(tmp_path))
    results = [*checks_machine.check_disk(here), *checks_machine.check_run_directory(here)]
    assert [r.status for r in results] == [Status.FAIL, Status.FAIL, Status.WARN]
    assert f"cannot write to {tmp_path}" in results[0].found


# ---- CPU -----------------------------------------------------------------------------------------


def facts(monkeypatch: pytest.MonkeyPatch, *features: str, best: str = "avx512_vnni") -> None:
    """A CPU with these features whose best target is ``best``."""
    order = ["avx512_vnni", "avx2", "scalar"]
    targets = [(name, order.index(name) >= order.index(best)) for name in order]
    found = targets, dict.fromkeys(features, True), "Some CPU"
    monkeypatch.setattr("deploy.checks_cpu.kernel_facts", lambda: found)


def test_instruction_set(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checks_cpu.check_instruction_set
    facts(monkeypatch, "avx2", "avx512_vnni")
    result = one(check, tmp_path)
    assert result.status is Status.PASS
    assert result.found == "target avx512_vnni on Some CPU with avx2 avx512_vnni"
    forced = one(check, tmp_path, KT_TARGET="scalar")
    assert (forced.status, forced.todo) == (Status.WARN, "set KT_TARGET=auto")
    facts(monkeypatch, "avx2", best="avx2")
    assert one(check, tmp_path).status is Status.WARN
    assert one(check, tmp_path, **tiny(prepared)).status is Status.PASS
    result = one(check, tmp_path, KT_TARGET="avx512_vnni")
    assert result.status is Status.FAIL
    assert result.todo == "set KT_TARGET to auto or one of avx2, scalar"


def test_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for features, status in (
        ((), Status.PASS),
        (("amx_tile", "amx_permitted"), Status.PASS),
        (("amx_tile",), Status.WARN),
    ):
        facts(monkeypatch, *features)
        assert one(checks_cpu.check_amx, tmp_path).status is status


def test_cpu_limits(tmp_path: Path, prepared: Prepared) -> None:
    check = checks_cpu.check_cpu_limits
    host(tmp_path)
    assert one(check, tmp_path).status is Status.PASS
    result = one(check, tmp_path, replace(SERVER, cpus=8, cores=8, cpu_quota=4.5))
    assert result.status is Status.WARN
    assert result.expected == "the use of all 128 CPUs"
    assert result.found == "a CPU set of 8, a quota of 4.5"
    assert one(check, tmp_path, LAPTOP, **tiny(prepared)).status is Status.PASS


# ---- GPU -----------------------------------------------------------------------------------------

T4 = Gpu("Tesla T4", 16 * GIB, (7, 5), (12, 2), driver="535.1")


def test_compute_capability(tmp_path: Path) -> None:
    check = checks_gpu.check_compute_capability
    assert one(check, tmp_path).status is Status.PASS
    result = one(check, tmp_path, with_gpu(T4))
    assert (result.status, result.found) == (Status.FAIL, "7.5, Tesla T4")
    assert list(check(situation(tmp_path, LAPTOP))) == []
    assert list(check(situation(tmp_path, with_gpu(T4), KT_DEVICE="cpu"))) == []


def test_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.checks_gpu.torch_cuda_version", lambda: (13, 0))
    check = checks_gpu.check_driver
    assert one(check, tmp_path, with_gpu(H200)).status is Status.PASS
    result = one(check, tmp_path, with_gpu(T4))
    assert (result.status, result.found) == (Status.FAIL, "one for CUDA 12.2 (version 535.1)")
    assert "as the installed torch is built for 13.0" in result.expected
    # Minor versions are compatible: a driver for 13.0 runs what is built for 13.1.
    monkeypatch.setattr("deploy.checks_gpu.torch_cuda_version", lambda: (13, 1))
    assert one(check, tmp_path, with_gpu(H200)).status is Status.PASS
    monkeypatch.setattr("deploy.checks_gpu.torch_cuda_version", lambda: None)
    assert list(check(situation(tmp_path))) == []


def test_cuda_version_of_the_installed_torch() -> None:
    import torch

    found = checks_gpu.torch_cuda_version()
    assert (found and f"{found[0]}.{found[1]}") == torch.version.cuda


def test_gpu_memory(tmp_path: Path) -> None:
    check = checks_gpu.check_gpu_memory
    tutorial = {"KT_NUM_GPU_EXPERTS": "1", "KT_MAX_TOTAL_TOKENS": "40000"}
    result = one(check, tmp_path, **tutorial)
    assert (result.status, result.expected) == (
        Status.PASS,
        "27.5 GiB free on each GPU for V3.2 (the model is not there yet)",
    )
    assert "what is in use is not known" in result.found
    busy = one(check, tmp_path, with_gpu(replace(L20, used_bytes=30 * GIB)), **tutorial)
    assert (busy.status, busy.todo) == (Status.FAIL, "end the programs that nvidia-smi lists")
    assert busy.found == "18.0 of 48.0 GiB"


def test_gpu_memory_says_which_numbers_to_change(tmp_path: Path) -> None:
    check = checks_gpu.check_gpu_memory
    small = with_gpu(replace(L20, memory_bytes=int(23.65 * GIB), used_bytes=0))
    tutorial = {"KT_NUM_GPU_EXPERTS": "1", "KT_MAX_TOTAL_TOKENS": "40000"}
    result = one(check, tmp_path, small, **tutorial)
    todo = "set KT_NUM_GPU_EXPERTS=0 KT_MAX_TOTAL_TOKENS=28000, which fit, or leave them to auto"
    assert (result.status, result.todo) == (Status.FAIL, todo)
    numbers = {"KT_NUM_GPU_EXPERTS": "0", "KT_MAX_TOTAL_TOKENS": "28000"}
    assert one(check, tmp_path, small, **numbers).status is Status.PASS
    # Without a number SGLang's cache takes all but 2%, and the activations find no room.
    unlimited = one(check, tmp_path, KT_MAX_TOTAL_TOKENS="none")
    assert (unlimited.status, unlimited.todo[:4]) == (Status.FAIL, "set ")
    modest = {"KT_MAX_TOTAL_TOKENS": "none", "KT_MEM_FRACTION_STATIC": "0.9"}
    assert one(check, tmp_path, **modest).status is Status.PASS
    tiny_card = with_gpu(replace(L20, memory_bytes=16 * GIB, used_bytes=0))
    assert one(check, tmp_path, tiny_card).todo.startswith("raise KT_TENSOR_PARALLEL_SIZE")


def test_number_of_gpus(tmp_path: Path) -> None:
    result = one(checks_gpu.check_device, tmp_path, KT_TENSOR_PARALLEL_SIZE="2")
    assert (result.status, result.expected) == (Status.FAIL, "2 NVIDIA GPUs")
    assert "set KT_TENSOR_PARALLEL_SIZE=1" in result.todo
    two = with_gpu(replace(L20, count=2))
    assert one(checks_gpu.check_device, tmp_path, two, KT_TENSOR_PARALLEL_SIZE="2").status == "PASS"


# ---- all of them ---------------------------------------------------------------------------------


def test_the_settings_know_all_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KT_IGNORE_CHECKS takes the names that the report shows, no more and no less."""
    monkeypatch.setattr("deploy.checks_gpu.torch_cuda_version", lambda: (13, 0))
    host(tmp_path, 512, CommitLimit=500, Committed_AS=1)
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n"})
    names = [r.check for r in run_checks(situation(tmp_path, with_gpu(H200)), all_checks())]
    assert list(dict.fromkeys(names)) == list(CHECK_NAMES)


def test_ignored_failures_are_warnings(tmp_path: Path) -> None:
    here = situation(host(tmp_path, 8), KT_IGNORE_CHECKS="memory,disk")
    (result,) = run_checks(here, [Entry(checks_machine.check_memory, True)])
    assert result.status is Status.WARN
    assert result.todo.endswith("(KT_IGNORE_CHECKS ignores it)")
    everything = situation(tmp_path, KT_IGNORE_CHECKS="all")
    assert {r.status for r in run_checks(everything, all_checks())} <= {Status.PASS, Status.WARN}


def test_an_unknown_name_to_ignore() -> None:
    result = run("serve", KT_IGNORE_CHECKS="memory,vramm")
    assert result.returncode == 2
    assert "KT_IGNORE_CHECKS: expected all, or names separated by commas out of" in result.stderr


def test_the_host_alone_needs_no_model() -> None:
    result = run("check", "--host", KT_MODEL_PATH="/no", KT_DEVICE="cpu", KT_IGNORE_CHECKS="all")
    assert result.returncode == 0, result
    names = [line.split(": ")[1] for line in result.stdout.splitlines() if ": expected" in line]
    assert {"memory", "disk", "instruction-set"} <= set(names)
    assert not {"model", "weights"} & set(names)


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert one(checks_machine.check_home, tmp_path).found == "/home/me"
    without_home(monkeypatch)
    result = one(checks_machine.check_home, tmp_path)
    assert result.status is Status.FAIL
    assert "HOME is not set" in result.found
