"""The workers: where they run, how many there are, and what they do when there is nothing to do."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kt_kernel import _ext, engine
from kt_kernel.host.cpus import Cpu, allowed_cpus
from tests.layers import RandomLayer, random_batch
from tests.shapes import LAYERS

CPUS = [cpu.id for cpu in allowed_cpus()]


def make_engine(threads: int, pools: int = 1) -> _ext.Engine:
    """A new one, whatever there is in the cache."""
    return engine._engine.__wrapped__(threads, pools, "scalar", 0)


def test_no_cpu_left_beside_the_gpu_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_engine(len(CPUS))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(engine, "cpus_beside_experts", lambda gpus: gpus)
    make_engine(len(CPUS) - 1)
    assert "faster" not in caplog.text
    make_engine(len(CPUS))
    assert f"--kt-cpuinfer {len(CPUS) - 1} is faster" in caplog.text


def test_gpus_are_those_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._gpus() == 0
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    assert engine._gpus() == 1
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert engine._gpus() == 2


def test_too_many_threads_are_refused_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found = make_engine(1000)
    assert sorted(cpu for group in found.cpus for cpu in group) == CPUS
    expected = f"asks for 1000 threads; this process may use {len(CPUS)} CPUs: running {len(CPUS)}"
    assert expected in caplog.text


def test_a_quota_limits_the_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "read_cpu_quota", lambda: 1.5)
    assert [len(group) for group in make_engine(len(CPUS) + 1, 2).cpus] == [1]
    assert ("with a control group's quota of 1.5: running 1" in caplog.text) == (len(CPUS) > 1)


def test_hyperthreads_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two = [Cpu(CPUS[0], 0, 0), Cpu(CPUS[-1], 0, 1)]
    monkeypatch.setattr(engine, "allowed_cpus", lambda: two)
    make_engine(1)
    assert caplog.text == ""
    make_engine(2)
    assert "2 threads on 1 physical cores: two threads of a core share its units" in caplog.text


def test_no_huge_pages_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "huge_page_mode", lambda: "never")
    make_engine(1)
    assert "transparent huge pages are off" in caplog.text


def workers() -> dict[str, tuple[str, str]]:
    """Task id -> (name, CPUs it may run on) of this process's workers."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("kt-worker-"):
            status = dict(
                line.split(":\t", 1) for line in (task / "status").open() if ":\t" in line
            )
            found[task.name] = (name, status["Cpus_allowed_list"].strip())
    return found


def test_workers_are_named_pinned_and_end_with_their_engine() -> None:
    before = workers()
    pinned = [[CPUS[0]], [CPUS[-1], CPUS[0]]]
    found = _ext.Engine(pinned, 2, "scalar")
    new = {task: worker for task, worker in workers().items() if task not in before}
    assert sorted(new.values()) == [
        ("kt-worker-0", f"{CPUS[0]}"),
        ("kt-worker-1", f"{CPUS[-1]}"),
        ("kt-worker-2", f"{CPUS[0]}"),
    ]
    del found
    assert workers() == before


def bits_of(layer: RandomLayer) -> list[np.ndarray]:
    """Gate, up and down as ``load_matrices`` takes bf16."""
    return [w.view(torch.uint16).numpy() for w in (layer.gate, layer.up, layer.down)]


def test_totals_count_each_call_once(tmp_path: Path) -> None:
    """Few tokens and many take different ways through a call; both count, and are written.

    The time of calls that wait for their turn is not counted twice.
    """
    e, k, h, i = LAYERS[0]
    shared = _ext.Engine([[CPUS[0]]], 1, "scalar")
    layer = _ext.Layer(shared, e, k, h, i, "int4")
    random = RandomLayer(LAYERS[0])
    layer.load_matrices(bits_of(random), "bf16", list(range(e)))
    assert set(shared.totals.values()) == {0}
    experts = 0
    started = time.monotonic_ns()
    jobs = []
    for tokens in (3, 20, 300, 300):
        x, ids, weights = random_batch(LAYERS[0], tokens)
        out = shared.take_buffer(x.nbytes)
        jobs.append(layer.submit(x.numpy(), ids.numpy(), weights.numpy(), out)[0])
        experts += len(ids.unique())
    for job in jobs:
        job.wait()
    elapsed = time.monotonic_ns() - started
    totals = shared.totals
    assert (totals["calls"], totals["tokens"], totals["experts"]) == (4, 623, experts)
    assert totals["prepare_ns"] > 0
    assert 0 < totals["workers_ns"] < elapsed
    engine.publish_totals(shared, tmp_path / "totals.json")
    assert json.loads((tmp_path / "totals.json").read_text()) == totals


def cpu_seconds_of_workers() -> float:
    """Not of the process: other tests leave threads in it that look for work now and then."""
    tasks = Path("/proc/self/task").iterdir()
    workers = [task for task in tasks if (task / "comm").read_text().startswith("kt-worker")]
    assert workers
    # utime and stime of proc(5)
    stats = [(task / "stat").read_text().rpartition(")")[2].split()[11:13] for task in workers]
    return sum(int(ticks) for stat in stats for ticks in stat) / os.sysconf("SC_CLK_TCK")


def test_idle_workers_take_no_cpu_time_and_are_woken() -> None:
    wrapper, batch = RandomLayer(LAYERS[0]).wrapper("int4"), random_batch(LAYERS[0], 10)
    want = wrapper.forward(*batch, 0)
    time.sleep(0.1)  # they spin a little before they sleep
    before = cpu_seconds_of_workers()
    time.sleep(2)
    assert cpu_seconds_of_workers() - before < 0.05
    assert torch.equal(wrapper.forward(*batch, 0), want)


@pytest.mark.parametrize("slices", [1, 2])
def test_an_error_in_a_worker_reaches_python(tmp_path: Path, slices: int) -> None:
    """The file shrinks after its header was checked; the workers live on."""
    path = tmp_path / "short"
    path.write_bytes(b"\0" * 100)
    e, k, h, i = LAYERS[0]
    groups = [[CPUS[0]]] * slices
    made = _ext.Engine(groups, slices, "scalar")
    layer = _ext.Layer(made, e, k, h, i, "int4")
    everything = list(range(e))
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"short ends before byte \d+"):
            layer.load_file(str(path), [[0, 0, 0]] * 3, _ext.int4_tables("int4"), everything)
    random = RandomLayer(LAYERS[0])
    x, ids, weights = random_batch(LAYERS[0], 5)
    want = random.wrapper("int4", threadpool_count=slices).forward(x, ids, weights, 0)
    layer.load_matrices(bits_of(random), "bf16", everything)
    found = made.take_buffer(x.nbytes)
    layer.submit(x.numpy(), ids.numpy(), weights.numpy(), found)[0].wait()
    assert torch.equal(torch.from_numpy(found).view(torch.float32).view(x.shape), want)


def test_a_job_outlives_its_layer_and_engine() -> None:
    """Whoever goes first: the output is whole, what is deferred too, and its memory its own."""
    e, k, h, i = LAYERS[0]
    made = _ext.Engine([[CPUS[0]]], 1, "scalar")
    layer, random = _ext.Layer(made, e, k, h, i, "int8"), RandomLayer(LAYERS[0])
    layer.load_matrices(bits_of(random), "bf16", list(range(e)))
    x, ids, weights = random_batch(LAYERS[0], 300)
    weights[:] = 1  # of equal ones the last is deferred, here of all tokens the same
    ids[:] = torch.tensor([2, 3])
    out = made.take_like(x.numpy())
    job, left = layer.submit(x.numpy(), ids.numpy(), weights.numpy(), out, 1)
    del layer, made
    now, later, none = ids.clone(), ids.clone(), torch.full_like(ids, -1)
    now[:, -1] = later[:, :-1] = -1
    other = random.wrapper("int8")
    late = other._weights.engine.take_like(x.numpy())
    other._weights.layer.submit(x.numpy(), none.numpy(), weights.numpy(), late, 0, left)[0].wait()
    job.wait()
    assert torch.equal(torch.from_numpy(out), other.forward(x, now, weights))
    assert torch.equal(torch.from_numpy(late), other.forward(x, later, weights))
