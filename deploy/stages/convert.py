"""The stage ``convert``: ``python -m convert`` with the tutorial's flags, in this process."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

from deploy.console import say
from deploy.hub.marker import is_whole_model, read_marker
from deploy.launch.argv import convert_command
from deploy.settings.config import Config, export
from deploy.settings.variables import commanded
from deploy.stages.stage import Stage
from deploy.stages.turns import add_turns, others_directory, problem_of, to_wait_by, wait_for
from deploy.state import DONE, StageState
from kt_kernel.errors import UserError
from kt_kernel.host.machine import survey


def run(config: Config, state: StageState, wait_by: str | None = None) -> int:
    """Convert the checkpoint; returns the converter's exit status.

    Args:
        wait_by: wait for the download first; where its state is.

    Raises:
        UserError: the checkpoint's download has not finished.
    """
    if wait_by is not None:
        others = others_directory(config["KT_RUN_DIR"], wait_by)
        model = config.path("KT_MODEL_PATH")
        wait_for("download", others, state, lambda: is_whole_model(model))
    state.set("checking")
    export(config)
    model_path = config.path("KT_MODEL_PATH")
    if not model_path.exists():
        raise UserError(
            f"KT_MODEL_PATH {model_path} does not exist: run `python entrypoint.py download` "
            f"first, or set it to a checkpoint's directory"
        )
    marker = read_marker(model_path)
    if marker is not None and not marker.complete:
        raise UserError(
            f"KT_MODEL_PATH {model_path} holds an unfinished download: run "
            f"`python entrypoint.py download` to finish it"
        )
    from convert import command as converter

    command = convert_command(config, survey())
    for note in command.notes:
        say(note)
    say(f"running: {command.shown()}")
    progress, failures = _Progress(state), list[str]()
    with progress:
        status = converter.main(command.argv[3:], progress.on_layers, failures.append, in_settings)
    if failures:
        state.fail(failures[0])
    elif status == 0:
        state.set(DONE)
    return status


def in_settings(reason: str) -> str:
    """An error of the converter with its flags as the settings that they were made from."""
    reason = reason.replace("python -m convert --help lists the flags", "docs/configuration.md")
    names = {flag.name: setting.name for setting, flag in commanded("convert")}
    return re.sub(r"(?<![\w/-])--[a-z][a-z-]*", lambda flag: names.get(flag[0], flag[0]), reason)


class _Progress:
    """Hands the converter's progress to the state file."""

    def __init__(self, state: StageState) -> None:
        self._state, self._finished = state, 0
        self._watch: AbstractContextManager[None] | None = None

    def on_layers(self, finished: int, total: int) -> None:
        """So many layers are finished; called first when the conversion starts."""
        self._finished = finished
        if self._watch is None:
            self._watch = self._state.watch("converting", total, lambda: self._finished, "layers")
            self._watch.__enter__()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)


STAGE = Stage(
    "convert",
    "quantise the experts' weights for the CPU",
    lambda config, args, state: run(config, state, to_wait_by(args)),
    add_turns,
    problem=problem_of,
    keeps_state=lambda _: True,
)
