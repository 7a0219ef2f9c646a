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

from deploy.config import Config, load
from deploy.errors import messages_of
from deploy.setting import AUTO, SECTIONS, STAGES, Setting
from deploy.settings import BY_NAME, TABLE
from deploy.state import STATEFUL, StageState, run_directory
from kt_kernel.errors import UserError, describe

DESCRIPTION = "Download, convert and serve DeepSeek V3.2 with its experts on the CPU."
STAGE_HELP = {
    "download": "download the model from the Hub, by commit, and verify it",
    "convert": "quantise the experts' weights for the CPU",
    "serve": "check everything, then become SGLang's server",
    "check": "report what this machine and the directories have and lack",
    "smoke": "send the tutorial's chat request to the running server",
    "health": "say in one line what the stage is doing; exit status 0 if all is well",
    "status": "answer GET /health with what the stages are doing, until told to end",
}


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
    for stage in STAGES:
        sub = stages.add_parser(
            stage,
            help=STAGE_HELP[stage],
            description=STAGE_HELP[stage][0].upper() + STAGE_HELP[stage][1:] + ".",
            epilog="Settings:\n\n" + settings_help([s for s in TABLE if stage in s.stages]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[env_file],
            allow_abbrev=False,
        )
        if stage == "serve":
            sub.add_argument(
                "--print",
                action="store_true",
                dest="print_only",
                help="print the server's command instead of starting it",
            )
            sub.add_argument(
                "--json", action="store_true", help='with --print: print {"argv": [...]}'
            )
        elif stage == "check":
            sub.add_argument("--json", action="store_true", help="print the report as JSON")
            sub.add_argument(
                "--host",
                action="store_true",
                help="only what the machine has; neither model nor weights have to be there yet",
            )
        elif stage == "health":
            sub.add_argument("--json", action="store_true", help="print the state as JSON")
            sub.add_argument(
                "--stage",
                choices=STATEFUL,
                dest="of_stage",
                help="the stage to tell about; the default is the one that runs or ran last",
            )
        elif stage == "smoke":
            sub.add_argument(
                "--base-url",
                metavar="URL",
                help="address of the server; the default follows KT_HOST and KT_PORT",
            )
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
    if args.stage == "serve" and args.json and not args.print_only:
        parser.error("--json goes with --print")
    state: StageState | None = None
    try:
        files = [*args.first_env_file, *getattr(args, "env_file", [])]
        try:
            config = load(os.environ, files, args.stage)
        except UserError:
            state = _open_state(args, _run_dir_of_environment())
            raise
        state = _open_state(args, config["KT_RUN_DIR"])
        return _run(args, config, state)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # of the output: kt_kernel/program.py tells
        messages = messages_of(error) if isinstance(error, UserError) else [describe(error)]
        for message in messages:
            print(f"error: {message}", file=sys.stderr)
        if state is not None:
            state.fail("; ".join(messages))
        return 1 if args.stage == "health" else 2  # health checks know 0 and 1 only
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if state is not None:
            state.fail("interrupted")
        os._exit(130)  # the Hub client's threads would finish their files first
    except Exception as error:
        if state is not None:
            state.fail(f"{type(error).__name__}: {error}")
        raise


def _run_dir_of_environment() -> str | Path:
    """KT_RUN_DIR where the settings as a whole cannot be had."""
    try:
        return cast(str | Path, BY_NAME["KT_RUN_DIR"].parse(os.environ.get("KT_RUN_DIR") or AUTO))
    except ValueError:
        return AUTO


def _open_state(args: argparse.Namespace, run_dir: str | Path) -> StageState | None:
    """The state of the stage, if it is one that has a state."""
    if args.stage not in STATEFUL or (args.stage == "serve" and args.print_only):
        return None
    return StageState(run_directory(run_dir), args.stage)


def _run(args: argparse.Namespace, config: Config, state: StageState | None) -> int:
    # Each stage imports what it needs: --help and --print stay fast.
    if args.stage == "serve":
        from deploy import serve

        return serve.run(config, args.print_only, args.json, state)
    if state is not None and args.stage == "download":
        from deploy import download

        return download.run(config, state)
    if state is not None:
        from deploy import convert_stage

        return convert_stage.run(config, state)
    if args.stage == "health":
        from deploy import health

        return health.run(config, args.of_stage, args.json)
    if args.stage == "status":
        from deploy import status

        status.run(config)
    if args.stage == "check":
        from deploy import check

        return check.run(config, args.json, args.host)
    from deploy import smoke

    return smoke.run(config, args.base_url)


def _suggest_stage(argv: Sequence[str]) -> None:
    """End with a suggestion if the first word that is no option is no stage."""
    words = iter(argv)
    for word in words:
        if word == "--env-file":
            next(words, None)
        elif not word.startswith("-"):
            if word not in STAGES:
                near = difflib.get_close_matches(word, STAGES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(STAGES)}"
                print(f"error: unknown stage {word}: {hint}", file=sys.stderr)
                raise SystemExit(2)
            return
