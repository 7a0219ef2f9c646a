"""What users get wrong: one clear message, a failed stage, and those after it wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.docker.engine import Engine, run
from tests.docker.project import Project

HERE = "tests/docker"


def assert_fails(project: Project, stage: str, *words: str) -> None:
    """The stage failed with one message that has the words, and stays; the later ones wait."""
    told = project.wait_until_told("failed: .*")
    errors = project.errors(stage)
    assert len(errors) == 1, project.logs(stage)
    assert "Traceback" not in project.logs(stage)
    for word in words:
        assert word in errors[0]
        assert word in told
    assert project.states()[stage] == "running"
    assert project.container(stage).attrs["RestartCount"] == 0


def test_a_token_is_missing_then_comes_from_a_file(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    gated = project(f"{HERE}/gated-hub.yml")
    gated.up("convert", "download")
    assert_fails(gated, "download", "HF_TOKEN")
    waits = ["python", "/app/entrypoint.py", "health", "--stage", "convert"]
    deadline = time.monotonic() + 60
    told = ""
    while told != "convert waits for download, which failed\n":  # it looks every second
        assert time.monotonic() < deadline, told
        told = gated.container("convert").exec_run(waits).output.decode()
    token = tmp_path / "token"
    token.write_text("hf_secret\n")
    token.chmod(0o644)
    tmp_path.chmod(0o755)
    gated = gated.with_files(HF_TOKEN_FILE=str(token))
    gated.up("convert", "download")
    for stage in ("download", "convert"):
        assert gated.container(stage).wait()["StatusCode"] == 0, gated.logs(stage)
    shown = gated.client.api.inspect_container(gated.container("download").id)
    assert "hf_secret" not in str(shown)
    assert "hf_secret" not in gated.logs("download")


def test_no_such_repository(project: Callable[..., Project]) -> None:
    wrong = project(KT_MODEL_ID="deepseek-ai/DeepSeek-V9")
    wrong.up("download")
    assert_fails(wrong, "download", "deepseek-ai/DeepSeek-V9")


def test_preflight_says_what_would_fail_after_hours(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """The settings as a whole, threads, limits, and volumes of another user."""
    wrong = project()
    (line,) = wrong.preflight(KT_CPUINFER="many")
    assert line.startswith("error: KT_CPUINFER: expected an integer")
    settings = tmp_path / "settings"
    settings.write_text("KT_CPUINFERR=2\n")
    (line,) = wrong.preflight(SETTINGS_FILE=str(settings))
    assert "KT_CPUINFERR: did you mean KT_CPUINFER?" in line
    (line,) = wrong.preflight(KT_CPUINFER="4096")
    assert line.startswith("FAIL: threads: expected KT_CPUINFER of at most")
    for name in ("models", "weights", "cache"):
        (tmp_path / name).mkdir()
    mine = {name.upper(): str(tmp_path / name) for name in ("models", "weights", "cache")}
    lines = wrong.preflight(RUN_AS="12345:12346", **mine)
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("FAIL: write-access: expected ")
        assert "chown -R 12345:12346" in line
    # Nothing was started, and what would be is not.
    wrong = wrong.with_files(KT_CPUINFER="many")
    result = wrong.up("download", check=False)
    assert result.returncode != 0
    assert wrong.states()["preflight"] == "exited (2)"
    assert wrong.states()["download"] == "created"
    # What is not about the server's settings answers all the same.
    assert wrong.wait_until_told("failed: .*").startswith("failed: KT_CPUINFER: expected an")


def test_volumes_are_full_then_have_room(project: Callable[..., Project]) -> None:
    """The stage that failed begins anew with the next `up`, in the same container."""
    full = project(f"{HERE}/full-models.yml", f"{HERE}/full-weights.yml")
    full.up("convert", "download")
    assert_fails(full, "download", "space")
    failed = {stage: full.container(stage).id for stage in ("download", "convert")}
    run(["mount", "-o", "remount,size=1g", str(full.volume("models"))])
    full.up("convert", "download")
    assert full.container("download").wait()["StatusCode"] == 0, full.logs("download")
    full.wait_until_told("failed: .*space.*")
    assert_fails(full, "convert", "space")
    # The model's sizes are known by now: preflight sees that its weights do not fit.
    assert full.up("convert", "download", check=False).returncode != 0
    full.wait_until_told("failed: disk: expected .* in KT_WEIGHT_PATH .*")
    run(["mount", "-o", "remount,size=1g", str(full.volume("weights"))])
    full.up("convert", "download")
    assert full.container("convert").wait()["StatusCode"] == 0, full.logs("convert")
    assert {stage: full.container(stage).id for stage in failed} == failed


def test_weights_without_their_download(project: Callable[..., Project]) -> None:
    """Each stage looks for the one before it, whatever started it."""
    alone = project()
    result = alone.compose("run", "--rm", "--no-deps", "-T", "convert", "convert", check=False)
    assert result.returncode == 2
    assert "does not exist" in result.stderr


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
