"""The command line of ``entrypoint.py``: parse the stage, load the settings, hand over."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, cast

from deploy.console import say, time_lines
from deploy.errors import UserErrors, messages_of
from deploy.settings.config import load, placeholders
from deploy.settings.row import AUTO, SECTIONS, Setting
from deploy.settings.table import TABLE
from deploy.settings.variables import BY_NAME
from deploy.stages.registry import STAGES
from deploy.stages.stage import Stage
from deploy.stages.turns import others_directory, stay
from deploy.state import StageState, run_directory
from kt_kernel.errors import UserError, describe
from kt_kernel.installed import missing_package

DESCRIPTION = "Download, convert and serve DeepSeek V3.2 with its experts on the CPU."


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> _Parser:
    """The parser; the settings in its help come from the table."""
    parser = _Parser(
        prog="entrypoint.py",
        description=DESCRIPTION,
        epilog="Settings are environment variables, or lines of an --env-file:\n\n"
        + settings_help(TABLE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    env_file = _Parser(add_help=False, allow_abbrev=False)
    env_file.add_argument(
        "--env-file",
        action="append",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="read settings from a file of NAME=value lines; may be repeated, a later file wins, "
        "and the environment wins over all files",
    )
    # The option may stand before the stage or after it; argparse lets the latter overwrite the
    # former, hence a destination of its own.
    parser.add_argument(
        "--env-file",
        action="append",
        type=Path,
        metavar="FILE",
        dest="first_env_file",
        default=[],
        help="the same, before the stage",
    )
    stages = parser.add_subparsers(dest="stage", metavar="{" + ",".join(STAGES) + "}")
    for stage in STAGES.values():
        sub = stages.add_parser(
            stage.name,
            help=stage.help,
            description=stage.help[0].upper() + stage.help[1:] + ".",
            epilog="Settings:\n\n" + settings_help([s for s in TABLE if stage.name in s.stages]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[env_file],
            allow_abbrev=False,
        )
        stage.add_arguments(sub)
    return parser


def settings_help(settings: Sequence[Setting]) -> str:
    """The settings with their defaults and help, by section."""
    lines = []
    for section in SECTIONS:
        rows = [setting for setting in settings if setting.section == section]
        if rows:
            lines.append(f"{section}:")
        for setting in rows:
            names = setting.name + (f" or {setting.file_name}" if setting.secret else "")
            default = f"; default: {setting.default}" if setting.default else ""
            lines.append(f"  {names} ({setting.expected}{default})")
            lines += textwrap.wrap(
                setting.help, 94, initial_indent="      ", subsequent_indent="      "
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns its exit status, 2 for a mistake in the settings or the set-up."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _suggest_stage(argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.stage is None:
        parser.error(f"expected a stage: {', '.join(STAGES)}")
    stage = STAGES[args.stage]
    if problem := stage.problem(args):
        parser.error(problem)
    in_turn = getattr(args, "in_turn", None)
    if stage.writes_log(args):
        time_lines()
    status, state, run_dir = _run(stage, args)
    if in_turn is not None and state is not None and status == stage.failed:
        stay(others_directory(run_dir, in_turn), state)
    return status


def _run(stage: Stage, args: argparse.Namespace) -> tuple[int, StageState | None, str | Path]:
    """Run a stage: its exit status, its state if it keeps one, and KT_RUN_DIR."""
    state: StageState | None = None
    run_dir = _run_dir_of_environment()
    try:
        files = [*args.first_env_file, *getattr(args, "env_file", [])]
        try:
            config = load(os.environ, files, stage.name, _warn if stage.any_settings else None)
        except UserError:
            state = _open_state(stage, args, run_dir)
            raise
        run_dir = config["KT_RUN_DIR"]
        state = _open_state(stage, args, run_dir)
        if stage.acts(args) and (problems := placeholders(config, stage.name)):
            raise UserErrors(problems)
        return stage.run(config, args, state), state, run_dir
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # of the output: kt_kernel/program.py tells
        messages = messages_of(error) if isinstance(error, UserError) else [describe(error)]
        for message in messages:
            print(f"error: {message}", file=sys.stderr)
        if state is not None:
            state.fail("; ".join(messages))
        return stage.failed, state, run_dir
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if state is not None:
            state.fail("interrupted")
        os._exit(130)  # the Hub client's threads would finish their files first
    except Exception as error:
        missing = missing_package(error) if isinstance(error, ImportError) else None
        if state is not None:
            state.fail(missing or f"{type(error).__name__}: {error}")
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        return stage.failed, state, run_dir


def _warn(problem: str) -> None:
    say(f"warning: {problem}")


def _run_dir_of_environment() -> str | Path:
    """KT_RUN_DIR where the settings as a whole cannot be had."""
    try:
        return cast(str | Path, BY_NAME["KT_RUN_DIR"].parse(os.environ.get("KT_RUN_DIR") or AUTO))
    except ValueError:
        return AUTO


def _open_state(stage: Stage, args: argparse.Namespace, run_dir: str | Path) -> StageState | None:
    """The state of the stage, if it keeps one."""
    return StageState(run_directory(run_dir), stage.name) if stage.keeps_state(args) else None


def _suggest_stage(argv: Sequence[str]) -> None:
    """End with a suggestion if the first word that is no option is no stage."""
    words = iter(argv)
    for word in words:
        if word == "--env-file":
            file = next(words, None)
            if file in STAGES and not Path(file).exists():
                print(
                    f"error: --env-file: expected a file, found the stage {file}: write "
                    f"--env-file FILE {file}",
                    file=sys.stderr,
                )
                raise SystemExit(2)
        elif not word.startswith("-"):
            if word not in STAGES:
                near = difflib.get_close_matches(word, STAGES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(STAGES)}"
                print(f"error: unknown stage {word}: {hint}", file=sys.stderr)
                raise SystemExit(2)
            return
