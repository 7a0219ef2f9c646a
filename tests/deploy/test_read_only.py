"""All stages on file systems that are really mounted read-only, as a shared volume is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.hub.marker import Marker, RepoFile
from tests.convert.test_full_disk import mount_namespace
from tests.deploy.helpers import REPO_ID, REPOSITORY, Prepared, clean_environment, content

#: Mounts its first two arguments read-only over themselves, then runs the rest.
MOUNT = (
    'for d in "$1" "$2"; do mount --bind "$d" "$d" && mount -o remount,ro,bind "$d" || exit 99; '
    'done; shift 2; cd "$PWD"; exec "$@"'
)
#: One process for all stages; a line of output for each. A server starts with these checks.
STAGES = """
import os, sys
from deploy.command_line import main
from convert.command import main as convert
given = dict(os.environ)
model, weights = given["KT_MODEL_PATH"], given["KT_WEIGHT_PATH"]
def stage(*words, **more):
    os.environ.clear()  # a stage leaves its own variables only
    os.environ.update(given | more)
    return main(words)
say = lambda *words: print("\\n=", *words)
say("download", stage("download"))
say("convert", stage("convert"))
say("verify", convert(["--input-path", model, "--output", weights, "--verify"]))
say("check", stage("check", "--json") in (0, 1))
say("another", stage("convert", KT_WEIGHT_PATH=weights + "/other"))
"""


def test_finished_model_and_weights(prepared: Prepared, tmp_path: Path) -> None:
    prefix = mount_namespace()
    if prefix is None:
        pytest.skip("this host lets nobody mount anything (needs CAP_SYS_ADMIN or user namespaces)")
    model = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    weights = Path(shutil.copytree(prepared.int4, tmp_path / "int4"))
    files = {path.name: RepoFile(path.stat().st_size, "", "0" * 40) for path in model.iterdir()}
    Marker(REPO_ID, "main", "1" * 40, files, complete=True).save(model)
    before = content(model), content(weights)
    result = subprocess.run(
        [*prefix, "sh", "-c", MOUNT, "sh", model, weights, sys.executable, "-c", STAGES],
        env=clean_environment(
            KT_MODEL_ID=REPO_ID,
            KT_MODEL_REVISION="1" * 40,
            KT_MODEL_PATH=str(model),
            KT_WEIGHT_PATH=str(weights),
            KT_RUN_DIR=str(weights / "run"),
            KT_DEVICE="cpu",
            HF_HOME=str(model / "cache"),
        ),
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    ended = [line for line in result.stdout.splitlines() if line.startswith("= ")]
    expected = ["download 0", "convert 0", "verify 0", "check True", "another 2"]
    assert ended == [f"= {line}" for line in expected], result.stderr
    report = json.loads(result.stdout.split("= verify 0\n")[1].split("\n= check")[0])
    found = {check["check"]: check["status"] for check in report["checks"]}
    assert {found[name] for name in ("model", "weights", "disk")} == {"PASS"}
    assert f"error: cannot write {weights}/other: Read-only file system\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert (content(model), content(weights)) == before
