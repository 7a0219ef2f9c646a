"""The stage ``convert``: becomes ``python -m convert`` with the tutorial's flags."""

from __future__ import annotations

from typing import NoReturn

from deploy.argv import convert_command
from deploy.config import Config, export
from deploy.machine import survey
from deploy.marker import read_marker
from deploy.report import say
from deploy.serve import become
from kt_kernel.errors import UserError


def run(config: Config) -> NoReturn:
    """Convert the checkpoint; the converter's exit status is this program's.

    Raises:
        UserError: the checkpoint's download has not finished.
    """
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
    become(command, config)
