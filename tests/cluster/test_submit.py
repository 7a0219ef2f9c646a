"""What ``cluster/slurm/submit`` refuses before it asks Slurm for anything."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.server import REPOSITORY

NO_SECRETS = {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KT_API_KEY", "KT_ADMIN_KEY"]
)
def test_a_secret_in_the_environment_would_be_kept_with_every_job(
    name: str, tmp_path: Path
) -> None:
    settings = tmp_path / "v32.env"
    settings.write_text("")
    result = subprocess.run(
        [str(REPOSITORY / "cluster/slurm/submit"), str(settings)],
        env=NO_SECRETS | {name: "hf_secret"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {name} is in the environment")
    assert result.stderr.count("\n") == 1
    assert "hf_secret" not in result.stderr


def test_where_there_is_no_cluster_nothing_is_left(tmp_path: Path) -> None:
    """There were only sbatch's own lines, and empty directories."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    sbatch.chmod(0o755)
    (tmp_path / "a.env").touch()
    here = {
        "PATH": f"{sbatch.parent}:{NO_SECRETS['PATH']}",
        "MEMORY": "1G",
        "RUN": f"{tmp_path}/run",
    }
    result = subprocess.run(
        [str(REPOSITORY / "cluster/slurm/submit"), str(tmp_path / "a.env")],
        env=here | {"RUN_BY": "pyxis", "IMAGE": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[1:] == [
        "error: sbatch takes no job 'download' and says why above: expected a cluster that answers "
        "(sinfo) and options it knows"
    ]
    assert not (tmp_path / "run").exists()


def test_a_job_ends_after_its_stage(tmp_path: Path) -> None:
    """Slurm tells the batch shell, and kills what is left when that ends."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\ntrap 'sleep 1; echo drained; exit 143' TERM\necho started\n"
        "while :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    code = f". {REPOSITORY}/cluster/slurm/stage.sh; set -eu; to_the_end stage serve"
    variables = {"PROJECT": str(tmp_path), "RUN_BY": "venv", "SETTINGS": "a.env"}
    with subprocess.Popen(
        ["bash", "-c", code], env=NO_SECRETS | variables, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        time.sleep(0.1)  # until it has its own handler
        job.send_signal(signal.SIGTERM)
        assert job.wait() == 143
        os.set_blocking(job.stdout.fileno(), False)  # what comes after the job's end is too late
        assert os.read(job.stdout.fileno(), 100) == b"drained\n"
