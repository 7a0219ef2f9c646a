"""The stage ``serve``: check, then become SGLang's server."""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

from deploy.argv import Command, resolve, serve_command
from deploy.by_card import memory_line
from deploy.checks import Situation, Status, all_checks, run_checks
from deploy.config import Config, export
from deploy.errors import UserErrors
from deploy.machine import survey
from deploy.report import say
from deploy.settings import commanded
from deploy.state import StageState
from kt_kernel.sglang_plugin import check_registered


def run(config: Config, print_only: bool, as_json: bool, state: StageState | None = None) -> int:
    """Start the server, or print its command.

    Does not return if the server starts: this process becomes it.

    Returns:
        0, after printing.

    Raises:
        UserError: a setting does not fit, or a check failed.
    """
    if state is not None:
        state.set("checking")
    export(config)
    machine = survey()
    command = serve_command(config, machine)
    if print_only:
        print(json.dumps({"argv": command.shown_argv()}) if as_json else command.shown())
        return 0
    _refuse_bytes(config)
    check_registered()
    for note in command.notes:
        say(note)
    values, _ = resolve(config, machine)
    memory = memory_line(values, machine)
    if memory is not None:
        say(memory)
    situation = Situation(values, config.environment, machine)
    known = situation.needs.known
    entries = [entry for entry in all_checks() if entry.serve and (known or not entry.sized)]
    results = run_checks(situation, entries)
    failed = [result.sentence() for result in results if result.status is Status.FAIL]
    for result in results:
        if result.status is Status.WARN:
            say(f"warning: {result.sentence()}")
    if failed:
        raise UserErrors(failed)
    environment = {**config.environment, **command.environment}
    if state is not None:
        environment |= state.for_server()
        state.set("loading")  # the process keeps its id, so that `health` sees it end
    become(command, environment)


def _refuse_bytes(config: Config) -> None:
    """SGLang's processes hand paths to each other as text."""
    names = [setting.name for setting, _ in commanded("serve")]
    bad = [name for name in names if not _is_text(str(config[name]))]
    if bad:
        raise UserErrors(
            [
                f"{name}: expected text in UTF-8, which SGLang needs, found {str(config[name])!r}: "
                f"rename the directory, or set a link to it"
                for name in bad
            ]
        )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a name that are not UTF-8
        return False
    return True


def become(command: Command, environment: dict[str, str]) -> NoReturn:
    """Replace this process by the command, run by the interpreter that runs this program."""
    say(f"starting: {command.shown()}")
    sys.stdout.flush()
    argv = [sys.executable, *command.argv[1:]]
    os.execve(sys.executable, argv, environment)
