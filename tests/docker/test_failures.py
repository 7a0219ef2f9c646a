"""What users get wrong: one clear message, a failed service, and nothing after it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docker.engine import Engine
from tests.docker.project import Project

HERE = "tests/docker"


def assert_stops_at(project: Project, stage: str, *words: str) -> None:
    """The stage failed with one message that has the words; no later stage was started."""
    stages = ["download", "convert", "serve"]
    states = project.states()
    assert states[stage] == "exited (2)", project.logs(stage)
    for later in stages[stages.index(stage) + 1 :]:
        assert states.get(later, "created") == "created"
    errors = project.errors(stage)
    assert len(errors) == 1, project.logs(stage)
    assert "Traceback" not in project.logs(stage)
    for word in words:
        assert word in errors[0]


def test_a_token_is_missing(project: Callable[..., Project]) -> None:
    gated = project(f"{HERE}/gated-hub.yml")
    assert gated.up(check=False).returncode != 0
    assert_stops_at(gated, "download", "HF_TOKEN")


def test_the_token_comes_from_a_file(project: Callable[..., Project], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_secret\n")
    token.chmod(0o644)
    tmp_path.chmod(0o755)
    gated = project(f"{HERE}/gated-hub.yml", HF_TOKEN_FILE=str(token))
    gated.up("download")
    assert gated.container("download").wait()["StatusCode"] == 0
    shown = gated.client.api.inspect_container(gated.container("download").id)
    assert "hf_secret" not in str(shown)
    assert "hf_secret" not in gated.logs("download")


def test_no_such_repository(project: Callable[..., Project]) -> None:
    wrong = project(KT_MODEL_ID="deepseek-ai/DeepSeek-V9")
    assert wrong.up(check=False).returncode != 0
    assert_stops_at(wrong, "download", "deepseek-ai/DeepSeek-V9")


def test_a_bad_value(project: Callable[..., Project]) -> None:
    wrong = project(KT_CPUINFER="many")
    assert wrong.up(check=False).returncode != 0
    assert_stops_at(wrong, "download", "KT_CPUINFER", "expected an integer", "many")


def test_a_misspelt_setting_in_the_settings_file(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    settings = tmp_path / "settings"
    settings.write_text("KT_CPUINFERR=2\n")
    wrong = project(SETTINGS_FILE=str(settings))
    assert wrong.up(check=False).returncode != 0
    assert_stops_at(wrong, "download", "KT_CPUINFERR", "did you mean KT_CPUINFER?")


@pytest.mark.parametrize(("stage", "volume"), [("download", "models"), ("convert", "weights")])
def test_a_volume_is_full(project: Callable[..., Project], stage: str, volume: str) -> None:
    full = project(f"{HERE}/full-{volume}.yml")
    assert full.up(check=False).returncode != 0
    assert_stops_at(full, stage, "space")


def test_weights_without_their_download(project: Callable[..., Project]) -> None:
    """Each stage looks for the one before it, whatever started it."""
    alone = project()
    alone.compose("up", "-d", "--no-build", "--no-deps", "convert")
    assert alone.container("convert").wait()["StatusCode"] == 2
    assert_stops_at(alone, "convert", "does not exist")


def test_no_gpu_with_the_gpu_file(engine: Engine, images: dict[str, str]) -> None:
    project = Project(
        engine, "nogpu", {**images, "MEMLOCK": "65536"}, files=("docker-compose.yml",)
    )
    try:
        result = project.up(check=False)
        assert result.returncode != 0
        assert "nvidia" in result.stderr
        assert result.stderr.count("could not select device driver") == 1
        states = project.states()
        assert {states[s] for s in ("download", "convert", "serve")} == {"created"}
    finally:
        project.down(volumes=True)
