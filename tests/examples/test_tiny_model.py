"""The training model computes what transformers computes, and is written and read in full."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from examples.tiny.config import TinySizes
from examples.tiny.model import TinyModel
from examples.tiny.tensors import SCALE_SUFFIX, tensor_specs
from examples.tiny.train import SIZES, export
from examples.tiny.trained import load, published_tensors
from tests.serve import reference_model


def test_logits_are_those_of_transformers(tiny_fp8: Path) -> None:
    """On the random checkpoint, whose correction biases, norms and blocks are far from neutral."""
    sizes = TinySizes()
    model = load(tiny_fp8, TinyModel(sizes))
    reference = reference_model.load(tiny_fp8, None, sizes.n_routed_experts)
    source = random.Random(5)
    tokens = [source.randrange(sizes.vocab_size) for _ in range(60)]
    expected = reference_model.log_probabilities(reference, tokens)
    with torch.no_grad():
        found = model.logits(torch.tensor([tokens]))[0].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_trained_model_survives_its_checkpoint(tmp_path: Path) -> None:
    """Every trained tensor is written under its published name, and only FP8 rounds it."""
    torch.manual_seed(6)
    model = TinyModel(SIZES)
    for moe in model.moe_layers:
        moe.bias.normal_()
    torch.save({"model": model.state_dict()}, tmp_path / "state.pt")
    export(tmp_path / "state.pt", tmp_path / "checkpoint")
    again = dict(published_tensors(load(tmp_path / "checkpoint", TinyModel(SIZES))))
    for name, value in published_tensors(model):
        error = (again[name] - value).abs().max()
        # Of e4m3 and bf16 the coarser: three bits after the leading one.
        assert error <= value.abs().max() / 16, name
        assert again[name].count_nonzero() > 0, name

    index = json.loads((tmp_path / "checkpoint/model.safetensors.index.json").read_text())
    expected = set()
    for spec in tensor_specs(SIZES):
        expected |= {spec.name, spec.name + SCALE_SUFFIX} if spec.kind == "linear" else {spec.name}
    assert index["weight_map"].keys() == expected
