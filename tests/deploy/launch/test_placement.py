"""KT_EXPERT_PLACEMENT=measured: the map that SGLang gets, and what is said where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source.config import ModelConfig
from deploy.launch.argv import Command, serve_command
from deploy.launch.placement import counted_model, counts_path
from deploy.settings.config import load
from kt_kernel.placement.counts import Model
from kt_kernel.placement.counts_file import add_counts
from tests.deploy.helpers import LAPTOP, Prepared


class Settings:
    """Settings of the tiny checkpoint, two experts of each layer resident."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.dims = ModelConfig(prepared.model).dims()
        self.counts = folder / "counts.json"
        self.given = {
            "KT_MODEL_PATH": str(prepared.model),
            "KT_WEIGHT_PATH": str(prepared.int4),
            "KT_NUM_GPU_EXPERTS": "2",
            "KT_EXPERT_PLACEMENT": "measured",
            "KT_EXPERT_COUNTS": str(self.counts),
            "KT_RUN_DIR": str(folder / "run"),
        }

    def values(self, **more: str) -> Mapping[str, Any]:
        return load({**self.given, **more}, (), "serve").values

    def command(self, **more: str) -> Command:
        return serve_command(load({**self.given, **more}, (), "serve"), LAPTOP)

    def count(self) -> None:
        """Layer i's experts i and i + 1 half of the pairs, and the others the rest."""
        counts = {}
        for layer in self.dims.moe_layers():
            counts[layer] = np.ones(self.dims.num_experts, np.int64)
            counts[layer][[layer, layer + 1]] = self.dims.num_experts // 2 - 1
        add_counts(self.counts, counted_model(self.values()), counts)


@pytest.fixture
def settings(prepared: Prepared, tmp_path: Path) -> Settings:
    return Settings(prepared, tmp_path)


def note_of(command: Command) -> str:
    (note,) = [note for note in command.notes if "KT_EXPERT_PLACEMENT" in note]
    assert "\n" not in note
    return note


def test_the_most_used_experts_come_first(settings: Settings) -> None:
    settings.count()
    command = settings.command()
    ((path, content),) = command.files.items()
    assert command.argv[command.argv.index("--init-expert-location") + 1] == str(path)
    assert path.name.endswith(".json")  # else SGLang takes it for JSON itself
    ordered = json.loads(content)["physical_to_logical_map"]
    every = list(range(settings.dims.num_experts))
    assert len(ordered) == settings.dims.num_layers
    for layer, order in enumerate(ordered):
        assert sorted(order) == every
        first = [layer, layer + 1] if settings.dims.is_moe_layer(layer) else [0, 1]
        assert order == first + [e for e in every if e not in first]
    # Of 16 experts two take 7 pairs each, and 14 one each.
    assert "which took 50.0% of the 84 pairs" in note_of(command)
    assert "experts 0 to 1 took" in note_of(command)


def test_nothing_is_told_to_sglang_by_default(settings: Settings) -> None:
    settings.count()
    for more in ({"KT_EXPERT_PLACEMENT": "first"}, {"KT_NUM_GPU_EXPERTS": "0"}):
        command = settings.command(**more)
        assert "--init-expert-location" not in command.argv
        assert command.files == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "nothing has been counted yet"),
        (b"{", "is not valid JSON"),
        (b"{}", "holds no expert counts"),
        (
            b'{"format": "kt-kernel-expert-counts", "format_version": 1, "fingerprint": "other", '
            b'"num_experts": 256, "layers": {}}',
            "has the counts of another model",
        ),
    ],
    ids=["none yet", "damaged", "foreign", "of another model"],
)
def test_without_counts_it_warns_and_takes_the_first(
    settings: Settings, content: bytes | None, said: str
) -> None:
    if content is not None:
        settings.counts.write_bytes(content)
    command = settings.command()
    assert "--init-expert-location" not in command.argv
    note = note_of(command)
    assert note.startswith("warning: ")
    assert said in note
    assert str(settings.counts) in note
    assert "as with KT_EXPERT_PLACEMENT=first" in note


def test_each_checkpoint_has_a_file_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = settings.values(KT_EXPERT_COUNTS="auto")
    model = counted_model(values)
    assert len(model.fingerprint) == 64
    found = counts_path(values, model)
    assert found == tmp_path / "kt-kernel" / f"experts-{model.fingerprint[:16]}.json"
    assert counts_path(settings.values(), model) == settings.counts
    for odd in ("", "../../x", "/etc/passwd-0123456789"):
        found = counts_path(values, Model(odd, model.num_experts))
        assert found == tmp_path / "kt-kernel" / "experts-unknown.json"


def test_the_report_says_both_shares(settings: Settings) -> None:
    settings.count()
    command = [sys.executable, "-m", "kt_kernel.placement", str(settings.counts)]
    said = subprocess.run([*command, "2"], capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in said.splitlines()][-1][-3:] == ["84", "7.1%", "50.0%"]
    settings.counts.write_text("[")
    ended = subprocess.run([*command, "2"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
