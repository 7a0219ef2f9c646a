"""What CUDA registers of the experts, what goes through staging buffers, and on which CPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kt_kernel.gpu_prefill import staging
from kt_kernel.gpu_prefill.staging import Registration, StagingBuffers, copying_cpus, registering
from kt_kernel.host.cpus import allowed_cpus

CPUS = [cpu.id for cpu in allowed_cpus()]
HELD = np.array([True, True, False, True])


class Cuda:
    """Registers so many times, then refuses."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[tuple[int, int]] = []  # shapes

    def __call__(self, memory: NDArray[np.uint8]) -> None:
        self.asked.append(memory.shape)
        if len(self.asked) > self.most:
            raise RuntimeError("cudaHostRegister failed: out of memory (CUDA error 2)")


def layer() -> list[torch.Tensor]:
    """Slices of 10 and 20 bytes for each of four experts."""
    return [torch.zeros(4, size, dtype=torch.uint8) for size in (10, 20)]


@pytest.fixture
def buffers() -> StagingBuffers:
    return StagingBuffers(None, [CPUS])


def test_all_is_registered(buffers: StagingBuffers) -> None:
    """By runs of experts: between them there is no memory."""
    cuda = Cuda(100)
    registration = Registration(cuda)
    for _ in range(2):
        assert registration.add(layer(), HELD, buffers) == {}
    assert cuda.asked == 2 * [(2, 10), (1, 10), (2, 20), (1, 20)]
    assert registration.summary(buffers).startswith(
        "180 bytes of experts registered with CUDA in 0 s"
    )


def test_after_a_refusal_all_goes_through_staging_buffers(buffers: StagingBuffers) -> None:
    """Of the first slice, the second run; no more is asked for, in later layers neither."""
    cuda = Cuda(1)
    registration = Registration(cuda)
    first, later = (registration.add(layer(), HELD, buffers) for _ in range(2))
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
    registration = Registration(Cuda(0))
    assert registration.add(layer(), HELD, buffers) == {}
    assert registration.summary(buffers).endswith(
        "90 bytes by the driver's own buffer, which is slower still: cudaHostAlloc failed"
    )


def test_nothing_is_registered_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    registering(None)(np.zeros(1, np.uint8))
    monkeypatch.setenv(staging.STAGING_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="_KT_GPU_PREFILL_STAGING is set"):
        registering(None)(np.zeros(1, np.uint8))


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
