"""From the environment and env files to checked values of the settings."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deploy.errors import UserErrors
from deploy.settings.env_file import read_env_file
from deploy.settings.row import AUTO, PREFIX, Setting
from deploy.settings.table import TABLE
from deploy.settings.value_types import BadValue
from deploy.settings.variables import (
    BY_NAME,
    SECRETS,
    is_for,
    is_known,
    known_names,
    may_show,
    shown_name,
)
from kt_kernel.files.foreign import read_stream

#: Begins the paths in the tutorial and in ``env/``.
PLACEHOLDER = "/path/to"


@dataclass(frozen=True)
class Config:
    """Values of the settings, and the environment that started programs get.

    Attributes:
        values: by name; None where nothing is set and there is no default.
        environment: the process's variables and those of the env files, the former winning;
            without those of other stages.
        from_files: names in ``environment`` whose value comes from an env file.
    """

    values: Mapping[str, Any]
    environment: Mapping[str, str]
    from_files: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def text(self, name: str) -> str:
        """The value of a setting that is text and always has a value."""
        return cast(str, self.values[name])

    def integer(self, name: str) -> int:
        """The value of a setting that is an integer and always has a value."""
        return cast(int, self.values[name])

    def path(self, name: str) -> Path:
        """The value of a setting that is a path and always has a value."""
        return cast(Path, self.values[name])


def load(
    environ: Mapping[str, str],
    env_files: Iterable[Path] = (),
    stage: str | None = None,
    warn: Callable[[str], None] | None = None,
) -> Config:
    """Read and check all settings.

    A variable of ``environ`` wins over the env files, a later file over an earlier one. An empty
    variable counts as not set. Secrets are read from their files only if ``stage`` uses them, and
    ``environment`` has only what is for ``stage`` or for no stage at all; without ``stage``, all.

    Args:
        warn: is told of unknown names and bad values, which are left out.

    Raises:
        UserErrors: without ``warn``: all of them, each with what was expected.
    """
    given: dict[str, tuple[str, str]] = {}  # name -> (value, where)
    earlier: dict[str, str] = {}  # what later files may use
    problems: list[str] = []
    for file in env_files:
        try:
            assignments = read_env_file(file, {**earlier, **environ})
        except UserErrors as error:
            problems += error.messages
            continue
        for line in assignments:
            earlier[line.name] = line.value
            if not is_known(line.name):
                problems.append(f"{line.where}: {_unknown(line.name)}")
            elif line.value or not _in_table(line.name):
                given[line.name] = (line.value, f"{line.where}: ")
    for name, value in environ.items():
        if name.startswith(PREFIX) and not is_known(name):
            problems.append(_unknown(name))
        elif value and _in_table(name):
            given[name] = (value, "")
    values: dict[str, Any] = {}
    for setting in TABLE:
        try:
            values[setting.name] = _value(setting, given, stage)
        except ValueError as error:
            problems.append(str(error))
            values[setting.name] = _value(setting, {}, stage)
            given.pop(setting.name, None)
    if problems and warn is None:
        raise UserErrors(problems)
    for problem in problems:
        assert warn is not None
        warn(problem)
    for setting in TABLE:
        # Who reads the variable itself knows no word for "choose": not set means that.
        if setting.by_name and values[setting.name] == AUTO:
            given.pop(setting.name, None)
            environ = {name: value for name, value in environ.items() if name != setting.name}
    environment = {name: value for name, (value, _) in given.items()}
    kept = {k: v for k, v in environ.items() if v or not _in_table(k)}
    if stage is not None:
        environment = {k: v for k, v in environment.items() if is_for(k, stage)}
        kept = {k: v for k, v in kept.items() if is_for(k, stage)}
    return Config(values, {**environment, **kept}, frozenset(environment) - frozenset(kept))


def placeholders(config: Config, stage: str) -> list[str]:
    """What is wrong with paths of a stage that are still those of ``env/``: one line for each."""
    return [
        f"{setting.name}: expected a path of this host, found {config[setting.name]}, which is the "
        f"example's: put your own directory in the place of {PLACEHOLDER}"
        for setting in TABLE
        if stage in setting.stages
        and str(config[setting.name]).startswith(f"{PLACEHOLDER}/")
        and not Path(PLACEHOLDER).exists()
    ]


def _in_table(name: str) -> bool:
    return name in BY_NAME or name in SECRETS


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists them all"
    return f"unknown setting {name if near else shown_name(name)}: {hint}"


def _value(setting: Setting, given: Mapping[str, tuple[str, str]], stage: str | None) -> Any:
    """The value of a setting; ValueError with the whole message if it is not valid."""
    text, where = given.get(setting.name, (setting.default, ""))
    if setting.secret and setting.file_name in given:
        file, file_where = given[setting.file_name]
        if setting.name in given:
            raise ValueError(
                f"{file_where}both {setting.name} and {setting.file_name} are set: keep one of them"
            )
        if stage is not None and stage not in setting.stages:
            return None
        text, where = _read_secret(setting, file, file_where), file_where
    if not text:
        return None
    try:
        return setting.parse(text)
    except (ValueError, RecursionError) as error:  # the latter from JSON, level on level
        shown = shorten(repr(text)) if may_show(setting.name) else "its value (not shown)"
        why = f": {error}" if isinstance(error, BadValue) else ""
        raise ValueError(
            f"{where}{setting.name}: expected {setting.expected}, found {shown}{why}"
        ) from None


def shorten(text: str, most: int = 200) -> str:
    """A text for a message of one line; its middle is left out if it is long."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def _read_secret(setting: Setting, file: str, where: str) -> str:
    try:
        text = read_stream(Path(file)).decode("utf-8").strip()
    except OSError as error:
        raise ValueError(
            f"{where}{setting.file_name}: cannot read {file}: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{where}{setting.file_name}: {file} is not a text file") from None
    if not text:
        raise ValueError(f"{where}{setting.file_name}: {file} is empty")
    if not text.isprintable():
        raise ValueError(f"{where}{setting.file_name}: {file} holds more than one line of text")
    return text


def export(config: Config) -> None:
    """Give this process the stage's variables, for libraries that read ``os.environ``.

    Those of the env files are added; those that are empty or of other stages are taken away.
    """
    for name in [name for name in os.environ if name not in config.environment]:
        del os.environ[name]
    os.environ.update(config.environment)
