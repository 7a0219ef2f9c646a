"""What the programs say where their packages are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kt_kernel.test_program import run_named


def test_a_missing_package_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    """Fails when `make venv` is forgotten and a traceback is all that says so."""
    result = run_named(tmp_path, "import no_such_package")
    assert result.returncode == 2
    assert b"found no no_such_package for " in result.stderr
    assert b"`make venv`" in result.stderr
    assert result.stderr.count(b"\n") == 1
    result = run_named(tmp_path, "import deploy.no_such_module")  # a fault of this program
    assert (result.returncode, b"Traceback" in result.stderr) == (1, True)


@pytest.mark.parametrize("stage", ["download", "convert", "smoke", "serve"])
def test_no_stage_without_its_packages(stage: str, tmp_path: Path) -> None:
    """-S leaves out what is installed, as the system's own Python does."""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-S", root / "entrypoint.py", stage],
        env={
            "PATH": os.environ["PATH"],
            "KT_RUN_DIR": str(tmp_path),
            "KT_DEVICE": "cpu",
            "KT_MODEL_PATH": str(tmp_path),  # convert looks first whether it is there
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert b"run `make venv`, then `.venv/bin/python`" in result.stderr
    assert b"Traceback" not in result.stderr
    if stage != "smoke":  # which keeps no state
        assert "make venv" in json.loads((tmp_path / f"{stage}.json").read_text())["message"]
