"""What a model needs, from its own files or from V3.2's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deploy.checks.needs import V32_BYTES, V32_RESIDENT_BYTES, model_needs
from deploy.launch.argv import resolve
from deploy.launch.gpu_memory import V32_CONFIG
from deploy.settings.config import load
from tests.deploy.helpers import LAPTOP, Prepared

# DeepSeek's own description: 671e9 parameters, 256 experts of 3 x 7168 x 2048 in 58 layers.
EXPERT_WEIGHTS = 256 * 3 * 7168 * 2048 * 58


def values(**settings: str) -> dict[str, object]:
    return resolve(load({"KT_DEVICE": "cuda", **settings}), LAPTOP)[0]


def test_v32_before_it_is_there(tmp_path: Path) -> None:
    needs = model_needs(tmp_path)
    assert not needs.known
    assert not needs.is_small
    assert needs.packed["int4"] == pytest.approx(EXPERT_WEIGHTS * 4.13 / 8, rel=0.001)
    assert needs.packed["int8"] == pytest.approx(EXPERT_WEIGHTS, rel=0.001)
    # Experts of the MTP layer, the rest of it (its own embedding and head) and what is loaded.
    mtp = 256 * needs.expert + 4e9
    assert needs.download == pytest.approx(58 * 256 * needs.expert + mtp + needs.resident, rel=0.01)
    assert needs.memory(values()) == pytest.approx(338e9 + 4e9, rel=0.02)


def test_settings_that_change_the_needs(tmp_path: Path) -> None:
    needs = model_needs(tmp_path)
    assert needs.memory(values(KT_NUM_GPU_EXPERTS="256")) < 10e9
    assert needs.memory(values(KT_METHOD="AMXINT8")) > 650e9
    assert needs.memory(values(KT_DEVICE="cpu")) > needs.memory(values()) + 30e9


def test_the_tiny_model(prepared: Prepared) -> None:
    needs = model_needs(prepared.model)
    assert needs.known
    assert needs.is_small
    for method, folder in (("int4", prepared.int4), ("int8", prepared.int8)):
        size = sum(file.stat().st_size for file in folder.glob("layer-*"))
        assert needs.packed[method] == pytest.approx(size, rel=0.01)
    files = sum(file.stat().st_size for file in prepared.model.glob("*.safetensors"))
    assert needs.download == pytest.approx(files, rel=0.01)
    experts = 4 * 16 * needs.expert  # three layers and the MTP layer
    assert 0 < needs.resident < needs.download - experts


def test_an_unfinished_download_is_estimated(prepared: Prepared, tmp_path: Path) -> None:
    whole = model_needs(prepared.model)
    part = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    sorted(part.glob("*.safetensors"))[0].unlink()
    needs = model_needs(part)
    assert needs.known
    assert (needs.packed, needs.download) == (whole.packed, whole.download)
    assert whole.resident <= needs.resident <= whole.download - 4 * 16 * whole.expert


def test_files_that_cannot_be_read_are_v32(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert not model_needs(tmp_path).known
    (tmp_path / "config.json").write_text(json.dumps({"n_routed_experts": "many"}))
    needs = model_needs(tmp_path)
    assert (needs.known, needs.download, needs.resident) == (False, V32_BYTES, V32_RESIDENT_BYTES)


def test_a_config_alone(tmp_path: Path) -> None:
    """The first file of a download is enough for the packed sizes."""
    (tmp_path / "config.json").write_text(json.dumps(dict(V32_CONFIG)))
    needs = model_needs(tmp_path)
    assert needs.known
    assert needs.packed == model_needs(tmp_path / "no").packed
