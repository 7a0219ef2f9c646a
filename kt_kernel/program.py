"""How the programs of this project begin and end: standard streams, exit status, their parent."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

from kt_kernel.errors import without_passwords
from kt_kernel.installed import missing_package

#: Exit status of a program whose reader went away, as a shell shows SIGPIPE.
READER_GONE = 141


def run_program(main: Callable[[], int] | str) -> NoReturn:
    """Run ``main`` and end the process with the status that it returns.

    Args:
        main: the function, or where it is, as in ``convert.command:main``: what it needs is then
            imported here, where an interrupt and a missing package are told as later.

    A path with an umlaut or with bytes that are no text can be printed to any output; a reader
    that goes away (``| head``) ends the program silently; an output that cannot be written,
    a current directory that is gone or closed to this user, or a package that is not installed, is
    one error line and status 2.
    """
    _prepare_streams()
    sys.excepthook = _print_exception
    try:
        os.chdir(Path.cwd())  # as the processes do that SGLang starts
    except OSError as error:
        _fail(f"the current directory cannot be used ({error.strerror}): change to another")
    try:
        try:
            status = _imported(main)() if isinstance(main, str) else main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except ImportError as error:
            if (missing := missing_package(error)) is None:
                raise
            _fail(missing)
        sys.stdout.flush()
    except BrokenPipeError:
        status = READER_GONE
    except OSError as error:
        if error.filename is not None:
            raise  # not the output's
        with contextlib.suppress(OSError):
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        status = 2
    else:
        sys.exit(status)
    os._exit(status)  # flushing again at the end would fail again


def _imported(name: str) -> Callable[[], int]:
    """The function of that name. Ctrl-C meanwhile ends the process as it ends one in C."""
    own = signal.getsignal(signal.SIGINT)
    if own is not signal.default_int_handler:  # ignored, as in the background of a script
        return cast(Callable[[], int], pkgutil.resolve_name(name))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return cast(Callable[[], int], pkgutil.resolve_name(name))
    finally:
        signal.signal(signal.SIGINT, own)


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends.

    Args:
        parent: its process id. One that has ended before is not told of: then this process ends.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signum)
    if os.getppid() != parent:
        os._exit(1)


def _print_exception(*error: Any) -> None:
    """What Python prints of a fault in the program, without the passwords in its addresses."""
    print(without_passwords("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _prepare_streams() -> None:
    # A file opened later would get the number of a stream that is closed, and what is printed.
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        # Not where a test or a caller has put another kind of stream.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
