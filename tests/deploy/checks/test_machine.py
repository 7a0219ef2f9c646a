"""Checks of memory and disks on made-up machines."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.checks import machine as checks_machine
from deploy.checks.result import Status
from deploy.hub.marker import Marker, RepoFile
from kt_kernel.gpu_prefill.memory import staging_bytes
from kt_kernel.host.machine import Machine
from tests.deploy.checks.situations import one, situation, tiny
from tests.deploy.helpers import L20, LAPTOP, Prepared, with_gpu, without_home
from tests.kt_kernel.host.fake_machine import GIB, host, write

# ---- memory --------------------------------------------------------------------------------------


def test_enough_memory(tmp_path: Path) -> None:
    result = one(checks_machine.check_memory, host(tmp_path, 512), KT_NUM_GPU_EXPERTS="1")
    assert result.status is Status.PASS
    assert result.expected == "341.0 GB of memory for V3.2 (the model is not there yet)"


def test_too_little_memory(tmp_path: Path, prepared: Prepared) -> None:
    result = one(checks_machine.check_memory, host(tmp_path, 256))
    assert (result.status, result.found) == (Status.FAIL, "274.9 GB")
    assert one(checks_machine.check_memory, tmp_path, **tiny(prepared)).status is Status.PASS
    assert one(checks_machine.check_memory, host(tmp_path, 2), **tiny(prepared)).status == "FAIL"


@pytest.mark.parametrize("name", ["KT_MAX_TOTAL_TOKENS", "KT_CHUNKED_PREFILL_SIZE"])
def test_a_setting_that_takes_too_much_memory_is_named(
    name: str, tmp_path: Path, prepared: Prepared
) -> None:
    """It was told to add memory, or to serve a smaller model than the tiny one."""
    settings = {**tiny(prepared), "KT_DEVICE": "cpu", name: "1000000000"}
    result = one(checks_machine.check_memory, host(tmp_path, 64), **settings)
    assert result.status is Status.FAIL
    assert result.todo.startswith(f"lower {name}, which takes ")


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
    monkeypatch.setattr("kt_kernel.host.memory.memory_policy_error", lambda: errno.EPERM)
    result = one(checks_machine.check_memory_policy, tmp_path)
    assert (result.status, result.found) == (Status.WARN, "EPERM from mbind")
    assert "SYS_NICE" in result.todo
    assert one(checks_machine.check_memory_policy, tmp_path, LAPTOP).status is Status.PASS
    monkeypatch.setattr("kt_kernel.host.memory.memory_policy_error", lambda: 0)
    assert one(checks_machine.check_memory_policy, tmp_path).status is Status.PASS


def test_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_kernel.host.limits.locked_memory_limit", lambda: 8 << 20)
    result = one(checks_machine.check_locked_memory, tmp_path)
    assert (result.status, result.found) == (Status.PASS, "8.4 MB, which is enough here")
    several = {"KT_TENSOR_PARALLEL_SIZE": "2"}
    result = one(checks_machine.check_locked_memory, tmp_path, **several)
    assert (result.status, result.found) == (Status.WARN, "8.4 MB")
    monkeypatch.setattr("kt_kernel.host.limits.locked_memory_limit", lambda: None)
    result = one(checks_machine.check_locked_memory, tmp_path, **several)
    assert (result.status, result.found) == (Status.PASS, "no limit")


def kernel(root: Path, release: str) -> Path:
    write(root, {"proc/sys/kernel/osrelease": f"{release}\n"})
    return root


def test_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only WSL keeps CUDA from registering the experts; the limit of locked memory does not."""
    monkeypatch.setattr("kt_kernel.host.limits.locked_memory_limit", lambda: 8 << 20)
    check = checks_machine.check_pinned_memory
    result = one(check, kernel(tmp_path, "6.8.0-45-generic"))
    assert (result.status, result.found) == (
        Status.PASS,
        "Linux, whose driver does so at any limit of locked memory",
    )
    result = one(check, kernel(tmp_path, "5.15.167.4-microsoft-standard-WSL2"))
    assert result.status is Status.WARN
    assert "WSL (kernel 5.15.167.4-microsoft-standard-WSL2)" in result.found
    assert "through staging buffers" in result.todo
    assert one(check, kernel(tmp_path, "4.4.0-19041-Microsoft")).status is Status.WARN


@pytest.mark.parametrize(
    ("machine", "settings"),
    [
        (LAPTOP, {}),
        (with_gpu(L20), {"KT_DEVICE": "cpu"}),
        (with_gpu(L20), {"KT_GPU_PREFILL_TOKEN_THRESHOLD": "none"}),
    ],
    ids=["no card", "CPU mode", "prompts on the CPUs"],
)
def test_pinned_memory_where_nothing_streams(
    tmp_path: Path, machine: Machine, settings: dict[str, str]
) -> None:
    root = kernel(tmp_path, "5.15.167.4-microsoft-standard-WSL2")
    found = checks_machine.check_pinned_memory(situation(root, machine, **settings))
    assert list(found) == []


def test_staging_buffers_count_as_memory(tmp_path: Path) -> None:
    with_buffers, without = (
        made.needs.memory(made.values)
        for made in (
            situation(tmp_path),
            situation(tmp_path, KT_GPU_PREFILL_TOKEN_THRESHOLD="none"),
        )
    )
    assert with_buffers - without == staging_bytes(2)


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
    monkeypatch.setattr("kt_kernel.host.memory.shared_memory", lambda _: (size, writable))
    check = checks_machine.check_shared_memory
    assert one(check, tmp_path, KT_TENSOR_PARALLEL_SIZE=gpus).status is status


# ---- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def free_space(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def set_free(free: float) -> None:
        usage = SimpleNamespace(total=free, used=0, free=int(free))
        monkeypatch.setattr("deploy.checks.machine.shutil.disk_usage", lambda _: usage)

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


# ---- the user ------------------------------------------------------------------------------------


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert one(checks_machine.check_home, tmp_path).found == "/home/me"
    without_home(monkeypatch)
    result = one(checks_machine.check_home, tmp_path)
    assert result.status is Status.FAIL
    assert "HOME is not set" in result.found
