"""Folders of baselines: the right Python, the pinned versions, a clear word when there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import baselines, limits
from benchmarks.baselines import Baselines, prepare
from benchmarks.engines import ENGINES
from benchmarks.errors import BenchmarkError
from benchmarks.worker_process import WORKERS


def test_versions_come_from_the_requirements() -> None:
    found = prepare.pinned_versions()
    assert set(found) == {spec.package for spec in ENGINES if spec.package}
    for name, version in found.items():
        text = (prepare.REQUIREMENTS / f"{name}.txt").read_text()
        assert text.startswith(f"{name}=={version} ")
        assert "--hash=sha256:" in text


def test_a_folder_for_another_python_is_refused(tmp_path: Path) -> None:
    manifest = {"python": "3.9", "versions": prepare.pinned_versions()}
    (tmp_path / baselines.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BenchmarkError, match=r"for Python 3\.9, this is"):
        Baselines.open(tmp_path)


def test_a_folder_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"python -m benchmarks\.baselines prepare --output"):
        Baselines.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"python": null}', '{"python": "3"}'])
def test_a_damaged_manifest_is_refused_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / baselines.MANIFEST).write_text(content)
    with pytest.raises(BenchmarkError, match=r"python -m benchmarks\.baselines prepare --output"):
        Baselines.open(tmp_path)
    made = []
    monkeypatch.setattr(prepare, "prepare", lambda folder, version: made.append(version))
    prepare.ensure(tmp_path)
    assert made == [baselines.this_python()]


def test_nothing_is_prepared_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(prepare, "prepare", lambda folder, version: made.append(version))
    prepare.ensure(tmp_path)
    assert made == [baselines.this_python()]
    versions = prepare.pinned_versions()
    manifest = {"python": baselines.this_python(), "versions": versions}
    (tmp_path / baselines.MANIFEST).write_text(json.dumps(manifest))
    prepare.ensure(tmp_path)
    assert len(made) == 1
    # Versions that were pinned anew are fetched.
    manifest["versions"] = versions | {"kt-kernel": "0.0.1"}
    (tmp_path / baselines.MANIFEST).write_text(json.dumps(manifest))
    prepare.ensure(tmp_path)
    assert len(made) == 2


def test_a_relative_output_is_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CMake would take it as relative to its source folder.
    asked: list[Path] = []

    def prepared(work: Path, target: Path, *_: str) -> str:
        asked.extend([work, target])
        return "1.0"

    monkeypatch.setattr(prepare, "_prepare_kt_kernel", prepared)
    monkeypatch.setattr(prepare, "_prepare_ggml", prepared)
    monkeypatch.setattr(limits, "compile_probe", asked.append)
    monkeypatch.chdir(tmp_path)
    prepare.prepare(Path("here"), "3.12")
    assert len(asked) == 5
    assert all(path.is_relative_to(tmp_path / "here") for path in asked)
    assert json.loads((tmp_path / "here" / baselines.MANIFEST).read_text())["python"] == "3.12"


def test_engines_have_workers_and_a_class_that_ours_is_in() -> None:
    keys = [spec.key for spec in ENGINES]
    assert len(set(keys)) == len(keys)
    for spec in ENGINES:
        assert (WORKERS / f"{spec.worker}.py").is_file()
        assert f"ours-int{spec.bits}" in keys
