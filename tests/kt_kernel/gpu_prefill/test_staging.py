"""What CUDA registers of the experts, what goes through staging buffers, and on which CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kt_kernel.gpu_prefill import staging
from kt_kernel.gpu_prefill.staging import (
    HostRegister,
    Registered,
    Registration,
    StagingBuffers,
    copying_cpus,
    registering,
)
from kt_kernel.host.cpus import allowed_cpus

CPUS = [cpu.id for cpu in allowed_cpus()]
HELD = np.array([True, True, False, True])


class Cuda:
    """Registers so many times, then refuses."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[tuple[int, ...]] = []  # shapes
        self.ended: list[tuple[int, ...]] = []

    def register(self, memory: NDArray[np.uint8]) -> None:
        self.asked.append(memory.shape)
        if len(self.asked) > self.most:
            raise RuntimeError("cudaHostRegister failed: out of memory (CUDA error 2)")

    def unregister(self, memory: NDArray[np.uint8]) -> None:
        self.ended.append(memory.shape)

    @property
    def calls(self) -> HostRegister:
        return HostRegister(self.register, self.unregister)


def layer() -> list[torch.Tensor]:
    """Slices of 10 and 20 bytes for each of four experts."""
    return [torch.zeros(4, size, dtype=torch.uint8) for size in (10, 20)]


@pytest.fixture
def buffers() -> StagingBuffers:
    return StagingBuffers(None, [CPUS])


def test_all_is_registered(buffers: StagingBuffers) -> None:
    """By runs of experts: between them there is no memory."""
    cuda = Cuda(100)
    registration = Registration(cuda.calls)
    kept = [registration.add(layer(), HELD, buffers) for _ in range(2)]
    assert [staged for _, staged in kept] == [{}, {}]
    assert cuda.ended == []
    assert cuda.asked == 2 * [(2, 10), (1, 10), (2, 20), (1, 20)]
    assert registration.summary(buffers).startswith(
        "180 bytes of experts registered with CUDA in 0 s"
    )


def test_after_a_refusal_all_goes_through_staging_buffers(buffers: StagingBuffers) -> None:
    """Of the first slice, the second run; no more is asked for, in later layers neither."""
    cuda = Cuda(1)
    registration = Registration(cuda.calls)
    first, later = (registration.add(layer(), HELD, buffers)[1] for _ in range(2))
    assert len(cuda.asked) == 2
    assert {number: part.rows.tolist() for number, part in first.items()} == {
        0: [False, False, False, True],
        1: HELD.tolist(),
    }
    assert [part.rows.tolist() for part in later.values()] == 2 * [HELD.tolist()]
    assert registration.summary(buffers) == (
        "CUDA registered 20 bytes of experts and refused the other 160 bytes (cudaHostRegister "
        "failed: out of memory (CUDA error 2)), so prompts take longer: 160 bytes go to the card "
        "through staging buffers, filled by 2 threads for each slice"
    )


def test_without_staging_buffers_the_driver_copies(
    buffers: StagingBuffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cudaHostAlloc failed")

    monkeypatch.setattr("kt_kernel._ext.Staging", refuse)
    registration = Registration(Cuda(0).calls)
    assert registration.add(layer(), HELD, buffers)[1] == {}
    assert registration.summary(buffers).endswith(
        "90 bytes by the driver's own buffer, which is slower still: cudaHostAlloc failed"
    )


def test_nothing_is_registered_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    registering(None).register(np.zeros(1, np.uint8))
    monkeypatch.setenv(staging.STAGING_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="_KT_GPU_PREFILL_STAGING is set"):
        registering(None).register(np.zeros(1, np.uint8))


@pytest.mark.parametrize("how", ["released", "gone"])
def test_what_is_registered_is_unregistered_once_before_it_goes(
    buffers: StagingBuffers, how: str
) -> None:
    """Nothing else holds the layer's memory here; what was refused was never registered."""
    cuda = Cuda(3)
    slices = layer()
    registered, _ = Registration(cuda.calls).add(slices, HELD, buffers)
    arrays = [weakref.ref(array) for array in registered._memory]
    slices.clear()
    assert cuda.ended == []
    assert all(array() is not None for array in arrays)
    if how == "released":
        registered.release()
        registered.release()
        assert sorted(cuda.ended) == sorted(cuda.asked[:3])
    del registered
    assert sorted(cuda.ended) == sorted(cuda.asked[:3])
    assert all(array() is None for array in arrays)


def test_what_cuda_refuses_to_unregister_is_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card would read old pages where memory that is mapped there next is registered."""
    monkeypatch.setattr(staging, "_still_registered", [])

    def refuse(_: NDArray[np.uint8]) -> None:
        raise RuntimeError("driver shutting down (CUDA error 4)")

    registered = Registered(refuse)
    arrays = []
    for size in (1, 2):
        memory = np.zeros(size, np.uint8)
        registered.add(memory)
        arrays.append(weakref.ref(memory))
    del memory
    try:
        registered.release()
    except RuntimeError as error:
        refusal = str(error)  # pytest.raises would keep the traceback, which holds the memory
    assert refusal.startswith("driver shutting down")
    del registered
    assert all(array() is not None for array in arrays)


def test_a_forked_process_unregisters_nothing() -> None:
    """It has no card: CUDA may be called in the parent alone."""
    cuda = Cuda(1)
    registered = Registered(cuda.unregister)
    registered.add(np.zeros(3, np.uint8))
    child = os.fork()
    if child == 0:
        registered.release()
        os._exit(len(cuda.ended))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    registered.release()
    assert cuda.ended == [(3,)]


AT_THE_END = """
from types import SimpleNamespace
import numpy as np
from kt_kernel.gpu_prefill.layer import LayerOnCard
from kt_kernel.gpu_prefill.staging import Registered
kept = []
for size in (1, 2, 3):
    registered = Registered(lambda memory: print(memory.size, flush=True))
    registered.add(np.zeros(size, np.uint8))
    kept.append(registered)
del registered
kept.pop(1)
anything = SimpleNamespace(engine=None, held=None, on_gpu=None, counts_on_card=None)
card = SimpleNamespace(add=lambda layer: None, forget_late=lambda layer: print("gone", flush=True))
kept.append(LayerOnCard(card, anything, anything, 1))
"""


def test_the_process_ends_without_unregistering() -> None:
    """That of V3.2's 338 GB would keep the end waiting."""
    program = [sys.executable, "-c", AT_THE_END]
    found = subprocess.run(program, check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout == "2\n"


def test_copying_threads_run_beside_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the node of the slice's workers; a worker that shares its CPU keeps all others waiting."""
    nodes = {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}
    monkeypatch.setattr(staging, "cpus_of_nodes", lambda: nodes)
    groups = [[0, 1, 2], [4, 5]]
    assert [copying_cpus(groups, number) for number in range(3)] == [[3], [6, 7], [3]]
    # Where workers have them all, the kernel finds a place among them.
    assert copying_cpus([[0, 1, 2, 3], [4]], 0) == [0, 1, 2, 3]
    # CPUs of more nodes than one, or of none that is known.
    assert copying_cpus([[8, 9]], 0) == [8, 9]
