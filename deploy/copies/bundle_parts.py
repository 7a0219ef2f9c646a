"""The parts of a bundle that are made and not copied: image, wheels, the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.console import say
from deploy.copies.copying import Progress, write_stream
from kt_kernel.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("docker", "podman")
#: Of ``requirements/``: what `make venv` installs, and the router of several servers.
REQUIREMENTS = ("bootstrap", "dev", "router")
PREFIX = "deepseek-v32"


def engine_there(environment: Mapping[str, str]) -> str | None:
    """The container engine of this host: the first that answers, else one that says why not."""
    there = [engine for engine in ENGINES if shutil.which(engine)]
    return next((e for e in there if _answers(e, environment)), there[0] if there else None)


def _answers(engine: str, environment: Mapping[str, str]) -> bool:
    """Whether an engine works here, and its daemon if it has one."""
    asked = subprocess.run([engine, "info"], env=environment, capture_output=True, check=False)
    return asked.returncode == 0


def engine_with(image: str, environment: Mapping[str, str]) -> str | None:
    """The container engine that has an image; None if there is none."""
    for engine in ENGINES:
        if shutil.which(engine) and _image_id(engine, image, environment):
            return engine
    return None


def _image_id(engine: str, image: str, environment: Mapping[str, str]) -> str:
    command = [engine, "image", "inspect", "--format", "{{.Id}}", image]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return found.stdout.strip().removeprefix("sha256:") if found.returncode == 0 else ""


def image_name(engine: str, image: str, environment: Mapping[str, str]) -> str:
    """Name of an image's file: another image has another one."""
    plain = re.sub(r"[^\w.-]+", "-", image)
    return f"{plain}-{_image_id(engine, image, environment)[:12]}.tar"


def save_image(
    engine: str, image: str, target: Path, environment: Mapping[str, str], progress: Progress
) -> str:
    """``docker save`` to a file; its SHA-256.

    Raises:
        UserError: the engine failed; nothing is left.
    """
    return _output_of([engine, "save", image], target, environment, progress)


def fetch_wheels(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """``pip download`` of the pinned requirements into a folder; the names of the files.

    Files of an earlier run are taken if their hash is right.

    Raises:
        UserError: pip failed, which has said why.
    """
    before = {path.name for path in folder.iterdir()}
    for name in REQUIREMENTS:
        requirements = ROOT / "requirements" / f"{name}.txt"
        _run(
            [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet",
             "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(folder),
             "-r", str(requirements)],
            environment,
        )  # fmt: skip
    found = sorted(path.name for path in folder.iterdir())
    say(f"wheels: {len(found)}, {len({*found} - before)} of them new")
    return found


def commit_of(environment: Mapping[str, str]) -> str:
    """The commit that is checked out.

    Raises:
        UserError: this is no git repository, or not a whole one.
    """
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        raise UserError(
            f"the part `source` is made with git: expected a repository in {ROOT} and git, found "
            f"none: leave the part out"
        )
    git = ["git", "-C", str(ROOT), "rev-parse"]
    if _run([*git, "--is-shallow-repository"], environment) == "true":
        raise UserError(
            f"the part `source` has the whole history: expected a full clone in {ROOT}, found a "
            f"shallow one, whose bundle cannot be cloned: run `git fetch --unshallow`, or leave "
            f"the part out"
        )
    return _run([*git, "HEAD"], environment)


def save_source(target: Path, environment: Mapping[str, str], progress: Progress) -> str:
    """``git bundle`` of the commit that is checked out, with its history; the file's SHA-256."""
    git = ["git", "-C", str(ROOT)]
    if _run([*git, "status", "--porcelain"], environment):
        say("warning: the repository has changes that are in no commit: they are not in the bundle")
    command = [*git, "bundle", "create", "--quiet", "-", "HEAD"]
    return _output_of(command, target, environment, progress)


def _output_of(
    command: Sequence[str], target: Path, environment: Mapping[str, str], progress: Progress
) -> str:
    """Write what a command prints to a file; its SHA-256."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None

        def succeeded(_: str) -> None:
            if process.wait() != 0:
                raise _failed(command, process.returncode)

        return write_stream(process.stdout.read, target, progress, succeeded)


def _failed(command: Sequence[str], status: int) -> UserError:
    return UserError(f"`{' '.join(command)}` failed with status {status}, see above")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints; it says on standard error why it fails."""
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode != 0:
        raise _failed(command, found.returncode)
    return found.stdout.strip()
