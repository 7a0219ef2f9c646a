"""``cluster/apptainer/stage``: what Apptainer, a pretended one, is told to run; and mistakes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.compose.files import REPOSITORY
from tests.docker.engine import run

STAGE = str(REPOSITORY / "cluster/apptainer/stage")


def stage(home: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A stage for a user with this home, an image ``a.sif`` and settings ``v32.env``."""
    program = home / "bin/apptainer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "PYTHONPATH=$PYTHONPATH"\n')
    program.chmod(0o755)
    (home / "a.sif").touch()
    (home / "v32.env").touch()
    return run(
        [STAGE, *words],
        {
            "HOME": str(home),
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "IMAGE": str(home / "a.sif"),
            "PYTHONPATH": "/host/modules",
            **variables,
        },
        check=False,
    )


def test_a_stage_has_its_settings_its_mounts_and_a_cache_to_write(tmp_path: Path) -> None:
    """The image is read-only, and its variables name /cache; the host's Python stays outside."""
    done = stage(tmp_path, str(tmp_path / "v32.env"), "serve", "--print", MOUNTS="/data,/fast")
    told = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert told[-1] == "PYTHONPATH="
    binds = told[told.index("--bind") + 1].split(",")
    assert binds == [f"{tmp_path}/.cache/deepseek-v32:/cache", str(tmp_path), "/data", "/fast"]
    assert (tmp_path / ".cache/deepseek-v32").is_dir()
    command = ["/opt/venv/bin/python", "/app/entrypoint.py", "--env-file", f"{tmp_path}/v32.env"]
    assert told[told.index(f"{tmp_path}/a.sif") + 1 : -1] == [*command, "serve", "--print"]


def test_slurm_runs_it_with_the_project_and_its_mounts(tmp_path: Path) -> None:
    """The jobs of ``RUN_BY=apptainer`` know no options of Apptainer's."""
    (tmp_path / "home").mkdir()
    stage(tmp_path / "home")  # pretends Apptainer
    script = f'source "{REPOSITORY}/cluster/slurm/stage.sh"; stage convert --check'
    done = run(
        ["bash", "-c", script],
        {
            "HOME": str(tmp_path / "home"),
            "PATH": f"{tmp_path}/home/bin:{os.environ['PATH']}",
            "PROJECT": str(REPOSITORY),
            "SETTINGS": str(tmp_path / "home/v32.env"),
            "RUN_BY": "apptainer",
            "IMAGE": str(tmp_path / "home/a.sif"),
            "MOUNTS": "/shared",
        },
    )
    told = done.stdout.splitlines()
    assert told[told.index("--bind") + 1].split(",")[2:] == [str(REPOSITORY), "/shared"]
    assert told[-3:-1] == ["convert", "--check"]


@pytest.mark.parametrize(
    ("words", "variables", "error"),
    [
        ([], {}, "expected a file of settings and a stage: cluster/apptainer/stage FILE.env serve"),
        (["/no.env", "serve"], {}, "/no.env: expected a file of settings, found none that can be"),
        (["{home}/v32.env", "serve"], {"IMAGE": "/b.sif"}, "IMAGE /b.sif is not there: apptainer "),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, words: list[str], variables: dict[str, str], error: str
) -> None:
    done = stage(tmp_path, *(word.format(home=tmp_path) for word in words), **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {error}")
