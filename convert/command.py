"""Command line of ``python -m convert``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from convert.audit import verify_output
from convert.layer_choice import LayerChoice, parse_layers
from convert.pipeline import Options, convert_checkpoint
from convert.progress_bar import Progress
from convert.source.formats import FORMATS
from convert.workers import Stopped, StopRequest, default_thread_count
from kt_kernel.errors import UserError, describe
from kt_kernel.host.cpus import cpus_of_nodes
from kt_kernel.packed import METHODS

_DESCRIPTION = """\
Convert the routed experts of a DeepSeek V3 family checkpoint to packed INT4 or INT8 files that
kt_kernel reads into memory. Needs no GPU. Experts of MTP layers, shared experts and dense layers
stay as they are, in the checkpoint. Interrupted at any moment (kill -9 too), the same command goes
on with the first unfinished layer.
"""

_EPILOG = """\
Exit codes: 0 finished, 2 the source, the output or the disk is not as it should be (one line on
stderr says what), 130 and 143 interrupted by SIGINT and SIGTERM.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as the one line that every other mistake gets."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python -m convert --help lists the flags")


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"is {value}, expected 1 to 4096")
    return value


_count.__name__ = "number"  # argparse names the type in its messages


def _layers(text: str) -> LayerChoice:
    try:
        return parse_layers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """The flags of the upstream tutorial's conversion command."""
    parser = _Parser(
        prog="python -m convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input-path", type=Path, metavar="DIR",
        help="directory of the downloaded checkpoint; may be left out with --verify",
    )  # fmt: skip
    parser.add_argument(
        "--input-type", choices=[*FORMATS, "auto"], default="fp8",
        help="dtype of the expert weights in it; int4 is compressed-tensors' pack-quantized with "
        "groups of 32, 64 or 128, and auto what the files hold (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR",
        help="directory for the packed files; made if it does not exist",
    )  # fmt: skip
    parser.add_argument(
        "--quant-method", choices=list(METHODS), default="int4",
        help="int4 (4.13 bits for each weight) and int4-4x8 (4.25 bits, more accurate) are served "
        "with --kt-method AMXINT4, int8 with AMXINT8 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cpuinfer-threads", type=_count, metavar="N",
        help="worker threads (default: the CPUs this process may use); the output does not depend "
        "on it",
    )  # fmt: skip
    parser.add_argument(
        "--threadpool-count", type=_count, metavar="N",
        help="NUMA nodes to spread the workers over (default: all); the output does not depend on "
        "it, and serving may use another number",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=_layers, metavar="A-B|I/N",
        help="convert these layers only (both ends count), or a part of all, as in 2/8, the second "
        "of eight; other processes, on this host or on others that share the directory, may "
        "convert more at the same time",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true",
        help="convert nothing: check a finished --output, by the digest of every file and, with "
        "--input-path, that the source is still what it was made from",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="FILE.json",
        help="write size, time and signal-to-noise ratios there, and a plot beside it",
    )  # fmt: skip
    parser.add_argument(
        "--no-merge-safetensor", action="store_true",
        help="accepted for compatibility and always so: the output is one file per layer",
    )  # fmt: skip
    return parser


def parse_options(argv: Sequence[str] | None) -> tuple[Options, bool]:
    """Flags -> options, and whether to verify instead of converting.

    Raises:
        UserError: a flag is unknown, missing or has a wrong value.
    """
    args = build_parser().parse_args(argv)
    if args.input_path is None and not args.verify:
        raise UserError("--input-path is missing; python -m convert --help lists the flags")
    options = Options(
        input_path=args.input_path,
        input_type=args.input_type,
        output=args.output,
        method=args.quant_method,
        threads=args.cpuinfer_threads or default_thread_count(),
        nodes=args.threadpool_count or len(cpus_of_nodes()),
        layers=args.layers,
        report=args.report,
    )
    return options, args.verify


@contextmanager
def _stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask the workers to stop; the same signal again ends the process at once.

    Nothing is interrupted in the middle of a step, so there is nothing to clean up but the file
    that is being written.
    """
    stop = StopRequest()

    def request(signum: int, _frame: object) -> None:
        stop.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    before = {num: signal.signal(num, request) for num in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for num, handler in before.items():
            signal.signal(num, handler)


def main(
    argv: Sequence[str] | None = None,
    on_layers: Callable[[int, int], None] = lambda finished, total: None,
    on_failure: Callable[[str], None] = lambda reason: None,
    worded: Callable[[str], str] = lambda reason: reason,
) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the flags; None takes this process's.
        on_layers: is told the finished layers and their total, at the start and after each layer.
        on_failure: is told the reason when the exit code will not be 0.
        worded: an error that names flags, in the words of who called this.
    """
    try:
        options, verify_only = parse_options(argv)
        with _stop_on_signals() as stop, Progress() as progress:
            if verify_only:
                verify_output(options, stop, progress.say)
            else:
                convert_checkpoint(options, stop, progress, on_layers)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # of the output: kt_kernel/program.py tells
        reason = worded(describe(error) if isinstance(error, OSError) else str(error))
        print(f"error: {reason}", file=sys.stderr)
        on_failure(reason)
        return 2
    except Stopped as stopped:
        finished = f"{stopped.finished} are finished and kept; " if stopped.finished else ""
        reason = (
            f"interrupted by {signal.Signals(stopped.signum).name}: {finished}run the same command "
            f"again to go on"
        )
        print(reason, file=sys.stderr)
        on_failure(reason)
        return 128 + stopped.signum
    return 0
