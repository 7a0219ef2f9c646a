"""The stage ``serve``: check, then become SGLang's server."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NoReturn

from deploy.checks.registry import CHECKS, run_checks
from deploy.checks.result import Status
from deploy.checks.situation import Situation
from deploy.console import say
from deploy.errors import UserErrors
from deploy.launch.argv import Command, resolve, serve_command
from deploy.launch.by_card import memory_line
from deploy.launch.endpoint import Endpoint, is_ready, url_for_others
from deploy.settings.config import Config, export
from deploy.settings.row import AUTO
from deploy.settings.variables import commanded
from deploy.stages.stage import Stage
from deploy.stages.turns import add_turns, others_directory, problem_of, to_wait_by, wait_for
from deploy.state import StageState
from kt_kernel.errors import UserError
from kt_kernel.files.durable import named_write_errors, replace_file
from kt_kernel.host.addresses import bound
from kt_kernel.host.machine import survey
from kt_kernel.program import end_with_parent
from kt_kernel.sglang_plugin import check_registered


def run(
    config: Config,
    print_only: bool,
    as_json: bool,
    state: StageState | None = None,
    wait_by: str | None = None,
    stays: bool = False,
) -> int:
    """Start the server, or print its command.

    Does not return if the server starts: this process becomes it, unless it ``stays``.

    Args:
        wait_by: wait for the conversion first; where its state is.
        stays: be the server's parent, and wait for its end.

    Returns:
        0, after printing; the server's exit status.

    Raises:
        UserError: a setting does not fit, or a check failed.
    """
    if state is not None:
        if wait_by is not None:
            others = others_directory(config["KT_RUN_DIR"], wait_by)
            # It loads numpy, which `serve --print` does without.
            from convert.manifest_file import are_complete

            weights = config.path("KT_WEIGHT_PATH")
            wait_for("convert", others, state, lambda: are_complete(weights))
        state.set("checking")
    export(config)
    machine = survey()
    command = serve_command(config, machine)
    if print_only:
        for note in command.notes:
            say(note)
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
    checks = [check for check in CHECKS if check.serve and (known or not check.sized)]
    results = run_checks(situation, checks)
    failed = [result.sentence() for result in results if result.status is Status.FAIL]
    for result in results:
        if result.status is Status.WARN:
            say(f"warning: {result.sentence()}")
    if failed:
        raise UserErrors(failed)
    if (cache := config["KT_WEIGHT_CACHE"]) is not None:
        from deploy.copies.weight_cache import local_copy  # it loads numpy

        weights = local_copy(config.path("KT_WEIGHT_PATH"), cache, state)
        config = replace(config, values={**config.values, "KT_WEIGHT_PATH": weights})
        command = serve_command(config, machine)
    for path, content in command.files.items():
        with named_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(path, content)
    environment = {**config.environment, **command.environment}
    environment |= _counting(values)
    if state is not None:
        environment |= state.for_server()
        state.set("loading")  # the process keeps its id, so that `health` sees it end
    with hold_address(values["KT_HOST"], values["KT_PORT"]):
        endpoint = _endpoint(config)
        if not stays and endpoint is None and config["KT_DRAIN_SECONDS"] is None:
            become(command, environment)
        server = start(command, environment)
    if endpoint is not None:
        endpoint.follow(lambda: is_ready(values["KT_HOST"], values["KT_PORT"]))
    status = status_of(server, endpoint, config["KT_DRAIN_SECONDS"])
    if status == STAGE.failed and state is not None:
        state.fail("the server ended with an error that its log tells")
    return status


def _counting(values: Mapping[str, Any]) -> dict[str, str]:
    """Environment in which the server keeps how often experts are used."""
    from deploy.launch.placement import counted_model, counts_path  # they load numpy
    from kt_kernel.placement.saving import COUNTS_VARIABLE

    try:
        return {COUNTS_VARIABLE: str(counts_path(values, counted_model(values)))}
    except UserError as error:
        say(f"warning: how often experts are used will not be counted: {error}")
        return {}


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


@contextmanager
def hold_address(host: str, port: int) -> Iterator[None]:
    """Keep the port from other programs while the server, which this process becomes, loads.

    The server inherits the socket and binds the port a second time before it listens.

    Raises:
        UserError: the port is not free.
    """
    with ExitStack() as stack:
        try:
            held = stack.enter_context(bound(host, port))
        except OSError as error:  # the check was ignored, or somebody came after it
            raise UserError(
                f"KT_PORT: expected port {port} on {host} to be free, found {error.strerror}: set "
                f"another port"
            ) from None
        held.set_inheritable(True)
        yield


def become(command: Command, environment: dict[str, str]) -> NoReturn:
    """Replace this process by the command, run by the interpreter that runs this program."""
    say(f"starting: {command.shown()}")
    sys.stdout.flush()
    argv = [sys.executable, *command.argv[1:]]
    os.execve(sys.executable, argv, environment)


def start(command: Command, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The command as a child, which inherits what this process holds."""
    say(f"starting: {command.shown()}")
    sys.stdout.flush()
    # In a group of its own: a launcher that signals the whole group tells this process only, which
    # removes the address first. Without this process nobody would end it.
    return subprocess.Popen(
        [sys.executable, *command.argv[1:]],
        env=environment,
        close_fds=False,
        process_group=0,
        preexec_fn=functools.partial(end_with_parent, os.getpid()),
    )


def _endpoint(config: Config) -> Endpoint | None:
    path, url = config["KT_ENDPOINT_PATH"], config["KT_ENDPOINT_URL"]
    if path is None:
        return None
    if url == AUTO:
        url = url_for_others(config.text("KT_HOST"), config.integer("KT_PORT"))
    return Endpoint(path, url)


def status_of(
    server: subprocess.Popen[bytes],
    endpoint: Endpoint | None = None,
    drain_seconds: int | None = None,
) -> int:
    """Wait for the server's end, and hand it the signals that are to end it; its exit status.

    Args:
        endpoint: its address, which goes before the server hears of its end.
        drain_seconds: from then on it has so long; None for as long as it takes.

    One that was told to end has been ended by the signal, whatever it makes of it: an engine that
    stops with the machine starts it again, too.
    """
    told: list[int] = []
    # A handler may come in the middle of another: it only notes the signal, which takes no lock.
    signals: SimpleQueue[int] = SimpleQueue()

    def note(signum: int, _: object) -> None:
        told.append(signum)
        signals.put(signum)

    def hand_on() -> None:
        first = signals.get()
        if endpoint is not None:
            endpoint.remove()
        if drain_seconds is not None:
            killing.start()
        server.send_signal(first)
        while True:
            server.send_signal(signals.get())

    def kill() -> None:
        say(f"requests are still under way after KT_DRAIN_SECONDS {drain_seconds}: ending them")
        server.kill()  # its processes end with it

    killing = threading.Timer(drain_seconds or 0, kill)
    killing.daemon = True
    threading.Thread(target=hand_on, name="signals", daemon=True).start()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, note)
    status = server.wait()
    killing.cancel()
    if endpoint is not None:
        endpoint.remove()
    ended_by = told[0] if told else max(0, -status)
    return 128 + ended_by if ended_by else status


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--print",
        action="store_true",
        dest="print_only",
        help="print the server's command instead of starting it",
    )
    add_turns(parser)
    parser.add_argument("--json", action="store_true", help='with --print: print {"argv": [...]}')


def _problem(args: Namespace) -> str:
    if args.json and not args.print_only:
        return "--json goes with --print"
    return problem_of(args)


STAGE = Stage(
    "serve",
    "check everything, then become SGLang's server",
    lambda config, args, state: run(
        config, args.print_only, args.json, state, to_wait_by(args), args.in_turn is not None
    ),
    _add_arguments,
    problem=_problem,
    acts=lambda args: not args.print_only,
    keeps_state=lambda args: not args.print_only,
)
