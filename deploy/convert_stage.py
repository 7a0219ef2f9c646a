"""The stage ``convert``: ``python -m convert`` with the tutorial's flags, in this process."""

from __future__ import annotations

from contextlib import AbstractContextManager

from convert import cli as converter
from deploy.argv import convert_command
from deploy.config import Config, export
from deploy.machine import survey
from deploy.marker import read_marker
from deploy.report import say
from deploy.state import DONE, StageState
from kt_kernel.errors import UserError


def run(config: Config, state: StageState) -> int:
    """Convert the checkpoint; returns the converter's exit status.

    Raises:
        UserError: the checkpoint's download has not finished.
    """
    state.set("checking")
    export(config)
    model_path = config.path("KT_MODEL_PATH")
    marker = read_marker(model_path)
    if marker is not None and not marker.complete:
        raise UserError(
            f"KT_MODEL_PATH {model_path} holds an unfinished download: run "
            f"`python entrypoint.py download` to finish it"
        )
    command = convert_command(config, survey())
    for note in command.notes:
        say(note)
    say(f"running: {command.shown()}")
    progress, failures = _Progress(state), list[str]()
    with progress:
        status = converter.main(command.argv[3:], progress.on_layers, failures.append)
    if failures:
        state.fail(failures[0])
    elif status == 0:
        state.set(DONE)
    return status


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
