"""The checkpoint and the packed layers are what ``serve`` accepts and SGLang reads."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.rehearsal import checkpoint, packed_layers
from benchmarks.rehearsal.sizes import MOE_LAYERS, config_of, with_moe_layers
from deploy.checks.model import check_model, check_weights
from deploy.checks.result import Result, Status
from deploy.checks.situation import Situation
from deploy.launch.gpu_memory import V32_CONFIG
from deploy.settings.config import load
from examples.tiny.fp8 import dequantize_blocks
from examples.tiny.tensors import tensor_specs
from kt_kernel import KTMoEWrapper
from kt_kernel.host.machine import survey
from kt_kernel.packed import METHODS
from tests.benchmarks.rehearsal import small


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "DRAWN", 1 << 22)
    monkeypatch.setattr(checkpoint, "DRAWN", (1 << 20) - 3)


@pytest.mark.parametrize("method", METHODS)
def test_each_number_of_layers_passes_the_checks_of_serve_and_loads(
    tmp_path: Path, method: str
) -> None:
    most, layout = small.with_moe_layers(2), small.layout(method)
    checkpoint.write_shards(tmp_path, most, 1)
    packed_layers.write_layers(tmp_path, layout, list(most.moe_layers))
    for count in (1, 2):
        check_and_load(tmp_path, count, method, None)


@pytest.mark.parametrize("links", ["hard", "symbolic"])
def test_one_file_under_all_names_passes_the_checks_of_serve_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    """Also on a filesystem that has no hard links, or on another one."""
    most, layout = small.with_moe_layers(3), small.layout("int4")
    first = most.moe_layers[0]
    checkpoint.write_shards(tmp_path, most, 1)
    packed_layers.write_layers(tmp_path, layout, [first])
    for name, value in packed_layers.one_file(first).items():
        monkeypatch.setenv(name, value)
    if links == "symbolic":
        link = os.link

        def refuse(source: Path, name: Path) -> None:
            if name.parent.name.startswith("weights"):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            link(source, name)

        monkeypatch.setattr(os, "link", refuse)
    weights = check_and_load(tmp_path, 3, "int4", first)
    layers = sorted(weights.glob("layer-*"))
    assert len(layers) == 3
    assert len({path.stat().st_ino for path in layers}) == 1
    assert {path.is_symlink() for path in layers} == {links == "symbolic"}


def check_and_load(folder: Path, count: int, method: str, only: int | None) -> Path:
    """The folder of the first layers' weights, after ``serve``'s checks and a call of the last."""
    layout = small.layout(method)
    model, weights = folder / f"model-{count}", folder / f"weights-{count}"
    checkpoint.write_view(model, folder, small.with_moe_layers(count), 1)
    packed_layers.write_view(weights, folder, model, layout, only)
    environment = {"KT_MODEL_PATH": str(model), "KT_WEIGHT_PATH": str(weights)}
    environment |= {"KT_METHOD": METHODS[method].kt_method, "KT_QUANT_METHOD": method}
    values = load(environment, [], "serve").values
    situation = Situation(values, environment, survey())
    results: list[Result] = [*check_model(situation), *check_weights(situation)]
    assert [r.status for r in results] == [Status.PASS] * 2, [r.sentence() for r in results]
    assert results[1].found == f"{count} layers of this model"
    wrapper = KTMoEWrapper(
        *(2 + count - 1, 256, 8, 256, 128),
        weight_path=str(weights),
        method=METHODS[method].kt_method,
    )
    wrapper.load_weights(torch.arange(256))
    ids = torch.arange(8, dtype=torch.int32)[None]
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    # Weights of variance 1 / K keep the size of activations: neither noise nor overflow.
    size = wrapper.forward(x, ids, torch.full((1, 8), 8**-0.5)).std()
    assert 0.1 < size < 2
    return weights


def test_tensors_have_their_scale_and_only_resident_experts_are_written(tmp_path: Path) -> None:
    sizes = dataclasses.replace(small.with_moe_layers(1), vocab_size=8192)
    checkpoint.write_shards(tmp_path, sizes, 2)
    tensors = {k: v for file in tmp_path.iterdir() for k, v in load_file(file).items()}
    experts = {name.split(".")[5] for name in tensors if ".experts." in name}
    assert experts == {"0", "1"}
    for spec in tensor_specs(sizes):
        if ".experts." in spec.name and spec.name not in tensors:
            continue
        value = tensors[spec.name]
        assert tuple(value.shape) == spec.shape
        if spec.kind == "linear":
            value = dequantize_blocks(value, tensors[spec.name + "_scale_inv"])
        if value.numel() > 10_000:
            # The scale is a power of two: at most a factor of sqrt(2) off.
            assert 0.7 < float(value.float().std()) / spec.std < 1.42, spec.name
    # More values than were drawn go on from their beginning.
    embedding = tensors["model.embed_tokens.weight"].flatten()
    assert len(embedding) > checkpoint.DRAWN
    assert torch.equal(embedding[checkpoint.DRAWN :][:99], embedding[:99])


def test_the_sizes_are_those_of_v32() -> None:
    config = config_of(MOE_LAYERS)
    for name, value in V32_CONFIG.items():
        if name not in ("num_nextn_predict_layers", "quantization_config"):
            assert config[name] == value, name
    assert with_moe_layers(2).moe_layers == range(3, 5)
