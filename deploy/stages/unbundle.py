"""The stage ``unbundle``: install what ``bundle`` collected, each file checked against its digest.

Needs nothing but Python's standard library: it runs before there is an environment. Killed at any
moment, the same command goes on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from convert.source.origin import MARKER_NAME
from deploy.console import say
from deploy.copies.bundle import (
    IMAGE,
    INSTALL_NAME,
    MODEL,
    PARTS,
    PROGRESS_SECONDS,
    WEIGHTS,
    WHEELS,
    foreign_name,
    require_room,
)
from deploy.copies.bundle_parts import ENGINES, engine_there
from deploy.copies.contents import in_groups
from deploy.copies.copying import (
    CopiedFile,
    Copying,
    Progress,
    copy_groups,
    damaged,
    filled_alone,
    remove_unfinished,
)
from deploy.copies.sums import SUMS_NAME, UNFINISHED_NAME, Record, read_sums, sha256_of
from deploy.hub.marker import file_size
from deploy.progress_lines import ProgressLines
from deploy.settings.config import Config
from deploy.stages.bundle import add_bundle
from deploy.stages.stage import Stage
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import FileMissing, read_file
from kt_kernel.files.units import gigabytes
from kt_kernel.packed import MANIFEST_NAME

#: Parts that are copied: the setting with the target, and the file that says that all is there.
COPIED = {MODEL: ("KT_MODEL_PATH", MARKER_NAME), WEIGHTS: ("KT_WEIGHT_PATH", MANIFEST_NAME)}


def run(config: Config, directory: Path, chosen: list[str] | None) -> int:
    """Install the parts of a bundle.

    Args:
        chosen: names of parts; None takes those that are in it.

    Returns:
        0, if all is installed.

    Raises:
        UserError: the bundle is not whole or is damaged, or the target holds something else.
    """
    parts = _parts(directory)
    wanted = chosen or list(parts)
    for part in wanted:
        if part not in parts:
            raise UserError(f"{directory} has no part `{part}`: it has {', '.join(parts)}")
    for part in wanted:
        files = parts[part]
        if part in COPIED:
            setting, last = COPIED[part]
            target = config.path(setting)
            with filled_alone(target, setting):
                _install(directory / part, target, files, setting, last)
        else:
            _check(directory / part, files)
            if part == IMAGE:
                _load(directory / part, files, config.environment)
            elif part == WHEELS:
                _tell_how_to_install(directory / part)
            else:
                say(f"source: right; `git clone {shlex.quote(str(directory / part))}/*.bundle`")
    return 0


def _parts(directory: Path) -> dict[str, dict[str, str]]:
    """Part -> name -> digest, of a whole bundle."""
    try:
        sums = read_sums(directory / SUMS_NAME)
    except FileMissing:
        raise UserError(
            f"{directory} holds no whole bundle, {SUMS_NAME} is missing: run `make bundle` to its "
            f"end and copy all of it"
        ) from None
    foreign = foreign_name(sums)
    if foreign is not None:
        raise UserError(f"{directory / SUMS_NAME} names {foreign}, which is in no bundle")
    parts: dict[str, dict[str, str]] = {}
    for name, sha256 in sums.items():
        part, _, plain = name.partition("/")
        if name != INSTALL_NAME:
            parts.setdefault(part, {})[plain] = sha256
    return {part: parts[part] for part in PARTS if part in parts}


def _install(
    source: Path, target: Path, digests: Mapping[str, str], setting: str, last: str
) -> None:
    """Copy a part to its place; ``last`` is the file that says that all is there."""
    files = [CopiedFile(name, _size(source / name), sha256) for name, sha256 in digests.items()]
    total = sum(file.size for file in files)
    unfinished = target / UNFINISHED_NAME
    if not unfinished.exists():
        if _is_installed(source, target, files, last):
            say(f"{setting} {target}: already there, {gigabytes(total)}")
            return
        if {path.name for path in target.iterdir()} - {"lost+found"}:
            raise UserError(
                f"{setting} {target} holds other files: expected an empty directory, or this very "
                f"part: choose another directory or delete that one"
            )
    record, progress = Record(unfinished), Progress()
    record.begin()
    remove_unfinished(target)
    copying = Copying(source, target, record, progress)
    require_room(target, copying.missing(files))
    with ProgressLines(setting, total, lambda: progress.done, PROGRESS_SECONDS):
        copy_groups(copying, in_groups(files))
    unfinished.unlink()
    say(f"{setting} {target}: {len(files)} files, {gigabytes(total)}")


def _is_installed(source: Path, target: Path, files: list[CopiedFile], last: str) -> bool:
    try:
        if read_file(source / last) != read_file(target / last):
            return False
    except FileMissing:
        return False
    return all(file_size(target / file.name) == file.size for file in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}, and {SUMS_NAME} names it: copy the whole bundle"
        ) from None


def _check(folder: Path, digests: Mapping[str, str]) -> None:
    for name, sha256 in digests.items():
        found = sha256_of(folder / name)
        if found != sha256:
            raise damaged(folder / name, sha256, found)


def _load(folder: Path, digests: Mapping[str, str], environment: Mapping[str, str]) -> None:
    engine = engine_there(environment)
    for name in digests:
        command = [engine or ENGINES[0], "load", "--input", str(folder / name)]
        if engine is None:
            say(f"image: right; no container engine is here to load it: {shlex.join(command)}")
        elif subprocess.run(command, env=environment, check=False).returncode != 0:
            raise UserError(f"`{shlex.join(command)}` failed, see above")


def _tell_how_to_install(folder: Path) -> None:
    """What pip and uv need to find the wheels; `make venv` uses both."""
    wheels = shlex.quote(str(folder.absolute()))
    say(
        f"wheels: right, for Python {sys.version_info[0]}.{sys.version_info[1]} if that made the "
        f"bundle; to install them: PIP_NO_INDEX=1 PIP_FIND_LINKS={wheels} UV_NO_INDEX=1 "
        f"UV_FIND_LINKS={wheels} make venv"
    )


STAGE = Stage(
    "unbundle",
    "check and install what `bundle` collected",
    lambda config, args, _: run(config, args.directory, args.part),
    add_bundle,
)
