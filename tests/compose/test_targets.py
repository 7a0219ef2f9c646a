"""Which commands the Makefile's targets run, with a ``docker`` that only writes them down."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compose.files import REPOSITORY

#: IMAGES are there; FILES is what the containers' labels say.
DOCKER = r"""#!/bin/sh
echo "$*" >> "$LOG"
for last; do :; done
case "$*" in
  "compose version") echo found ;;
  *" ps -aq") [ -z "$FILES" ] || echo c1 c2 ;;
  "inspect "*) echo "$FILES" ;;
  "image inspect "*) case " $IMAGES " in *" $last "*) ;; *) exit 1 ;; esac ;;
  *" config --images "*) echo "image-of-$last" ;;
  *" config "*) printf 'services:\n  x:\n    pull_policy: %s\n' "$PULL_POLICY" ;;
  *" build "*) echo "labels: $REVISION $IMAGE_VERSION" >> "$LOG" ;;
esac
"""


@dataclass
class Result:
    """The commands of ``docker compose`` that do something, and what was said."""

    commands: list[str]
    told: str


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str, **variables: str) -> Result:
    result = _run(folder, *words, **variables)
    asks = (" version", " ps -aq", " config ")
    done = [
        line.removeprefix("compose -f docker-compose.yml ")
        for line in (folder / "log").read_text().splitlines()
        if line.startswith("labels: ")
        or (line.startswith("compose ") and not any(word in line for word in asks))
    ]
    return Result(done, result.stderr)


def _run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    log = folder / "log"
    log.write_text("")
    known = {"LOG": str(log), "FILES": "", "IMAGES": "", "PULL_POLICY": "never", **variables}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["make", "--no-print-directory", *words],
        env={"PATH": path, "HOME": str(folder), **known},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_a_target_takes_the_overrides_of_what_runs(folder: Path) -> None:
    # One container is from before the last `up`, which left out the router and added monitoring.
    runs = {
        "FILES": "2026-12-01T10:00:01.5Z /x y/docker-compose.yml,/x y/compose/cpu.yml,"
        "/x y/compose/monitoring.yml,/x y/compose/mine.yml\n"
        "2026-12-01T10:00:00.5Z /x y/docker-compose.yml,/x y/compose/replicas.yml"
    }
    for target, command in (
        ("down", "down --remove-orphans"),
        ("logs", "logs -f --tail 100"),
        ("chat", "run --rm --no-deps client"),
    ):
        found = make(folder, target, **runs)
        assert found.commands == [f"-f compose/cpu.yml -f compose/monitoring.yml {command}"]
        assert found.told.startswith('WITH="cpu monitoring", as what is there was started')
    assert make(folder, "down", "WITH=", **runs) == Result(["down --remove-orphans"], "")
    (command,) = make(folder, "down", "WITH=speciale", **runs).commands
    assert command == "-f compose/speciale.yml down --remove-orphans"
    assert make(folder, "down") == Result(["down --remove-orphans"], "")


def test_a_first_build_is_announced_and_labelled(folder: Path) -> None:
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    ).stdout.strip()
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    labels = f"labels: {revision} {version}"
    found = make(folder, "image", "WITH=cpu")
    assert "There is no image image-of-preflight yet" in found.told
    found = make(folder, "up", "WITH=cpu", IMAGES="image-of-hub")
    assert found.commands[:3] == [
        "-f compose/cpu.yml build preflight",
        labels,
        "-f compose/cpu.yml run --rm --no-deps preflight check --first",
    ]
    assert "There is no image image-of-preflight yet" in found.told
    # All there: an `up` builds nothing, and `make image` does all the same.
    there = "image-of-preflight image-of-router"
    found = make(folder, "up", "WITH=replicas", IMAGES=there)
    assert found.commands[0].endswith("preflight check --first")
    assert found.told == ""
    found = make(folder, "image", "WITH=replicas", IMAGES=there)
    builds = [f"-f compose/replicas.yml build {name}" for name in ("preflight", "router")]
    assert found == Result([builds[0], labels, builds[1], labels], "")


def test_an_image_from_a_registry_is_not_built(folder: Path) -> None:
    (command,) = make(folder, "convert", "WITH=", PULL_POLICY="missing").commands
    assert command == "run --rm --no-deps convert"


def test_a_bundle_has_the_image_of_compose(folder: Path) -> None:
    """Compose knows IMAGE of .env; the directory's name may have blanks."""
    target = ("-n", "bundle", "BUNDLE=/a b")
    found = _run(folder, *target).stdout
    assert 'entrypoint.py bundle "/a b"  --image image-of-preflight' in found
    assert "--image mine:1" in _run(folder, *target, IMAGE="mine:1").stdout
    found = _run(folder, "-n", "unbundle", "BUNDLE=/a b", "PARTS=image").stdout
    assert 'entrypoint.py unbundle "/a b" --part image' in found


def test_a_file_of_settings_reaches_every_stage_on_the_host(folder: Path) -> None:
    """`make convert` was in the container then, and the others on the host read no file at all."""
    for stage in ("download", "convert", "serve", "check", "smoke", "health", "status"):
        found = _run(folder, "-n", stage, "ENV_FILE=a.env b.env").stdout
        assert f"entrypoint.py --env-file a.env --env-file b.env {stage}\n" in found
    for stage in ("bundle", "unbundle"):
        found = _run(folder, "-n", stage, "ENV_FILE=a.env").stdout
        assert f"entrypoint.py --env-file a.env {stage} " in found


def test_what_the_machine_lacks_is_asked_before_anything_is_installed(folder: Path) -> None:
    """`make doctor` fetched 11 GB first."""
    found = _run(folder, "-n", "doctor", "VENV=/not/there").stdout
    assert found == "python3 entrypoint.py check --host\n"


def test_variables_of_the_environment_reach_compose_unchanged(folder: Path) -> None:
    """Also those whose names the Makefile mentions."""
    names = sorted(set(re.findall(r"\$\{([A-Z_]+)", _all_compose_files())) - {"PATH", "HOME"})
    assert "IMAGE" in names
    given = {name: f"value-of-{name}" for name in names}
    result = _run(folder, "--eval", "show: ; @env", "show", **given)
    shown = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    assert {name: shown.get(name) for name in names} == given


def _all_compose_files() -> str:
    files = [REPOSITORY / "docker-compose.yml", *(REPOSITORY / "compose").glob("*.yml")]
    return "".join(file.read_text() for file in files)
