"""Captured calls that words of pinned memory start and end, and the thread that watches them."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kt_kernel import _ext
from tests.csrc.stream import fake_cuda
from tests.csrc.stream.fake_cuda import Stream
from tests.csrc.stream.test_stream_layer import SHAPE, Batch, Layer, inputs, result

#: How memory operations fail on the stand-in, and what the proof says of it.
BROKEN = {
    1: r"cuStreamBatchMemOp failed: CUDA_ERROR_NOT_SUPPORTED \(801\)",
    2: "what a graph writes to pinned memory does not arrive",
    3: "a graph does not wait for a word of pinned memory",
}


def flagged() -> _ext.StreamContext:
    context = _ext.StreamContext(fake_cuda.library()._name)
    context.use_flags(fake_cuda.library()._name)
    return context


def captured(stream: Stream, layer: Layer, batch: Batch) -> ctypes.c_void_p:
    stream.begin_capture()
    layer.run(stream, batch)
    return stream.end_capture()


def host_functions_of(stream: Stream, graph: ctypes.c_void_p) -> int:
    """That a replay calls."""
    stream.synchronize()
    before = int(fake_cuda.library().fake_host_functions())
    stream.launch(graph)
    stream.synchronize()
    return int(fake_cuda.library().fake_host_functions()) - before


@pytest.mark.parametrize("how", BROKEN)
def test_where_they_do_not_work_host_functions_stay(stream: Stream, how: int) -> None:
    """Found out by a graph of its own, before the model's graphs would hang or read too early."""
    context = _ext.StreamContext(fake_cuda.library()._name)
    fake_cuda.library().fake_break_memory_ops(how)
    with pytest.raises(RuntimeError, match=f"^{BROKEN[how]}$"):
        context.use_flags(fake_cuda.library()._name, 0.1)
    assert not context.flags
    with pytest.raises(RuntimeError, match="flags are not in use: expected use_flags before"):
        context.flags = True
    layer, batch = Layer(context), Batch.of(3)
    graph = captured(stream, layer, batch)
    assert host_functions_of(stream, graph) == 2
    assert torch.equal(result(batch.out), layer.expected(3))


def test_a_driver_that_is_not_there() -> None:
    context = _ext.StreamContext(fake_cuda.library()._name)
    for driver, wrong in (
        ("libnowhere.so", r"the CUDA driver libnowhere\.so is not loaded"),
        ("libc.so.6", r"the CUDA driver libc\.so\.6 has no cuStreamBatchMemOp_v2"),
    ):
        with pytest.raises(RuntimeError, match=wrong):
            context.use_flags(driver)
    assert not context.flags


def test_a_graph_has_one_host_function(stream: Stream) -> None:
    """It wakes the thread, before the first call; a call outside of graphs has two."""
    context = flagged()
    layers, batch = [Layer(context, layer_idx) for layer_idx in range(5)], Batch.of(2)
    graphs = []
    for flags in (True, False, True):
        context.flags = flags
        stream.begin_capture()
        for layer in layers:
            layer.run(stream, batch)
        graphs.append(stream.end_capture())
    assert [host_functions_of(stream, graph) for graph in graphs] == [1, 10, 1]
    assert torch.equal(result(batch.out), layers[-1].expected(2))


def test_while_a_graph_is_captured(stream: Stream) -> None:
    """SGLang's first capture may come before anything else has needed the context."""
    context, batch = _ext.StreamContext(fake_cuda.library()._name), Batch.of(2)
    layer = Layer(context)
    stream.begin_capture()
    context.use_flags(fake_cuda.library()._name)
    layer.run(stream, batch)
    graph = stream.end_capture()
    assert host_functions_of(stream, graph) == 1
    assert torch.equal(result(batch.out), layer.expected(2))


def test_a_call_that_its_graph_does_not_wait_for(stream: Stream) -> None:
    """Of a pass that was broken off: the next call of the set gets its own."""
    context = flagged()
    left, layers = Layer(context, 0), [Layer(context, 2), Layer(context, 4)]
    large, batches = Batch.of(300), [Batch.of(3), Batch.of(5)]
    stream.begin_capture()
    left.submit(stream, large)
    broken_off = stream.end_capture()
    stream.begin_capture()
    for layer, batch in zip(layers, batches, strict=True):
        layer.run(stream, batch)
    graph = stream.end_capture()
    fake_cuda.library().fake_set_delay(100)
    for seed in range(20):
        new = [inputs(batch.x.shape[0], torch.float32, seed) for batch in batches]
        for batch, values in zip(batches, new, strict=True):
            for array, value in zip((batch.x, batch.ids, batch.weights), values, strict=True):
                stream.copy(array, value.numpy())
        stream.launch(broken_off)
        stream.launch(graph)
        stream.synchronize()
        for layer, batch, values in zip(layers, batches, new, strict=True):
            assert torch.equal(result(batch.out), layer.wrapper.forward(*values, 0)), seed
    fake_cuda.library().fake_set_delay(0)
    assert context.failure == ""


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def test_a_proof_whose_graph_runs_after_it_was_given_up() -> None:
    """It must end then: neither its stream may wait for ever, nor the thread for its end."""
    before, old = threads(), set(watchers())
    context = _ext.StreamContext(fake_cuda.library()._name)
    fake_cuda.library().fake_set_delay(200_000)
    with pytest.raises(RuntimeError, match="does not arrive"):
        context.use_flags(fake_cuda.library()._name, 0.001)
    ((name, task),) = ((name, task) for name, task in watchers().items() if name not in old)
    assert len(threads() - before) == 2  # a slow stream, and the thread that watches
    time.sleep(1)
    fake_cuda.library().fake_set_delay(0)
    assert eventually(lambda: state(task) == "S")
    used = seconds_of(task)
    time.sleep(0.5)
    assert seconds_of(task) - used < 0.1
    context.use_flags(fake_cuda.library()._name)
    assert threads() - before == {name}
    assert context.flags
    del context
    assert threads() <= before


def test_a_replay_wakes_the_thread(stream: Stream) -> None:
    """By itself it would look after half a minute."""
    before = set(watchers())
    context = _ext.StreamContext(fake_cuda.library()._name)
    context.use_flags(fake_cuda.library()._name, nap=30)
    (task,) = (task for name, task in watchers().items() if name not in before)
    layer, batch = Layer(context), Batch.of(4)
    graph = captured(stream, layer, batch)
    for _ in range(3):
        time.sleep(0.05)
        assert eventually(lambda: state(task) == "S")
        stream.fill(batch.out, 0)
        stream.launch(graph)
        replayed = threading.Thread(target=stream.synchronize)
        replayed.start()
        replayed.join(15)
        assert not replayed.is_alive()
        assert torch.equal(result(batch.out), layer.expected(4))


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 15
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return reached


def state(task: Path) -> str:
    """Of a thread: ``R`` runs, ``S`` sleeps."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def watchers() -> dict[str, Path]:
    """The threads that watch words, by thread id."""
    tasks = {}
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "kt-flags":
            tasks[task.name] = task
    return tasks


def seconds_of(task: Path) -> float:
    """Processor time of a thread."""
    return int((task / "schedstat").read_text().split()[0]) / 1e9


def test_an_idle_server_takes_no_processor_time(stream: Stream) -> None:
    """After 20 ms without a call the thread sleeps, and a replay wakes it again."""
    before = set(watchers())
    context = flagged()
    (task,) = (task for name, task in watchers().items() if name not in before)
    layer, batch = Layer(context), Batch.of(4)
    graph = captured(stream, layer, batch)
    for _ in range(3):
        stream.fill(batch.out, 0)
        stream.launch(graph)
        stream.synchronize()
        assert torch.equal(result(batch.out), layer.expected(4))
        time.sleep(0.1)
    used = seconds_of(task)
    time.sleep(1)
    assert seconds_of(task) - used < 0.05


def test_a_context_goes_with_its_thread_and_memory() -> None:
    before, registered = set(watchers()), int(fake_cuda.library().fake_registered())
    context = flagged()
    assert len(set(watchers()) - before) == 1
    assert int(fake_cuda.library().fake_registered()) > registered
    del context
    gc.collect()
    assert set(watchers()) <= before
    assert int(fake_cuda.library().fake_registered()) == registered


def test_a_forked_process_ends() -> None:
    """It has the context, but not the thread: there is nothing to wait for.

    Not even while the thread naps, with a condition variable that the fork has a copy of.
    """
    context = flagged()
    for _ in range(5):
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            del context
            os._exit(0)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
    assert context.flags


def test_the_thread_keeps_off_the_workers() -> None:
    """Where other CPUs are left; a worker beside a thread that polls would get half of its CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    before = set(watchers())
    context = flagged()
    (name,) = set(watchers()) - before
    left = set(cpus[1:]) or set(cpus)
    for workers in (cpus[:1], cpus):  # the second leaves none, so all may be used as before
        engine = _ext.Engine([workers], 1, "scalar")
        _ext.StreamLayer(context, _ext.Layer(engine, *SHAPE, "int8"), 0)
        assert os.sched_getaffinity(int(name)) == left
