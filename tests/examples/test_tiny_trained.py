"""The trained checkpoint is what its recipe says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.tiny.config import TinySizes
from examples.tiny.tensors import tensor_specs
from examples.tiny.train import HELD_OUT_PER_TASK, SIZES, scores
from examples.tiny.trained import CHECKPOINT, hashes, recipe

README = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "README.md"


def test_files_are_those_of_the_recipe() -> None:
    assert hashes(CHECKPOINT) == recipe()["sha256"]


def test_checkpoint_holds_every_published_tensor() -> None:
    weight_map = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["weight_map"]
    expected = set()
    for spec in tensor_specs(SIZES):
        expected |= {spec.name, f"{spec.name}_scale_inv"} if spec.kind == "linear" else {spec.name}
    assert set(weight_map) == expected
    size = sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors"))
    assert size <= 12_000_000
    assert TinySizes() != SIZES, "otherwise the random checkpoint's tests would be enough"


@pytest.mark.slow
def test_scores_are_those_of_the_recipe() -> None:
    """One question more or less, as sums are added in another order elsewhere."""
    found = scores(CHECKPOINT, recipe()["facts"])
    assert found["accuracy"] == pytest.approx(recipe()["accuracy"], abs=1.5 / HELD_OUT_PER_TASK)
    for task, accuracy in found["accuracy"].items():
        assert accuracy >= 0.95, task


def test_every_expert_matters() -> None:
    for lightest, heaviest in recipe()["expert load"]:
        assert 0.3 < lightest < 1 < heaviest < 3


def test_readme_shows_the_scores() -> None:
    text = README.read_text("utf-8")
    for task, accuracy in recipe()["accuracy"].items():
        assert re.search(rf"^\| {task} \|.*\| {accuracy:.1%} \|$", text, re.MULTILINE), task
