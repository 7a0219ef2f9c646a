"""Layers whose calls the card takes part in, with the CPU in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kt_kernel import KTMoEWrapper
from kt_kernel.gpu_prefill import start
from kt_kernel.gpu_prefill.start import STAND_IN_VARIABLE, THRESHOLD_VARIABLE
from tests.kt_kernel.gpu_prefill.divided_calls import LAYOUT, TOP_K, Make
from tests.kt_kernel.layer_files import write_layer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layers")
    for layer_idx in range(3):
        write_layer(made, LAYOUT, layer_idx)
    return made


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes loaded layers, whose calls of 16 tokens or more the card takes part in."""
    monkeypatch.setenv(STAND_IN_VARIABLE, "float32")
    monkeypatch.setenv(THRESHOLD_VARIABLE, "16")
    start.card_experts.cache_clear()
    start.registration.cache_clear()

    def loaded(layer_idx: int = 0, residents: int = 0, deferred: int = 0) -> KTMoEWrapper:
        wrapper = KTMoEWrapper(
            layer_idx,
            LAYOUT.num_experts,
            TOP_K,
            LAYOUT.hidden_size,
            LAYOUT.intermediate_size,
            num_gpu_experts=residents,
            cpuinfer_threads=2,
            threadpool_count=2,
            weight_path=str(folder),
            method="AMXINT4",
            max_deferred_experts_per_token=deferred,
        )
        wrapper.load_weights(torch.arange(LAYOUT.num_experts))
        return wrapper

    yield loaded
    start.card_experts.cache_clear()
    start.registration.cache_clear()
