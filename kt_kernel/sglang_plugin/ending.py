"""How a server ends: what its main process says of it, on what its other processes end."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable
from multiprocessing.popen_spawn_posix import Popen
from typing import Any

from kt_kernel.program import end_with_parent
from kt_kernel.server_phase import ENDING, READY, tell_phase

_interruptible: weakref.WeakSet[Any] = weakref.WeakSet()  # event loops that handle SIGINT


def tell_ready(result: Any, *_: Any, **__: Any) -> None:
    """After ``_wait_and_warmup``, which sets the server's status where it succeeds."""
    server = importlib.import_module("sglang.srt.entrypoints.http_server")
    if server._global_state.tokenizer_manager.server_status.name == "Up":
        tell_phase(READY)


def tell_ending(*_: Any, **__: Any) -> None:
    """Before ``SignalHandler.sigterm_handler``: what ends from here on was told to."""
    tell_phase(ENDING)


def end_like_terminate(result: None, manager: Any) -> None:
    """After ``TokenizerManager.auto_create_handle_loop``, which handles SIGTERM: SIGINT, too.

    A second one ends the process at once, and its children with it.
    """
    loop = manager.event_loop
    if threading.current_thread() is not threading.main_thread() or loop in _interruptible:
        return
    _interruptible.add(loop)
    handler = manager.signal_handler_class(manager)

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        handler.sigterm_handler()

    loop.add_signal_handler(signal.SIGINT, interrupted)


def prepare_end() -> None:
    """In each process, with the plugin: who ends on what.

    The main process ends on SIGINT while it loads, as on SIGTERM, and nobody shows a traceback. Its
    children are born deaf to SIGINT, which a terminal sends to all: they end with their parent.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # SGLang asks for this, too, but not whether the parent died before: while this process was
        # importing. Then it would stay for ever.
        assert parent.pid is not None
        end_with_parent(parent.pid)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    popen: Any = Popen  # whose method no type stub knows
    if not hasattr(popen._launch, "__wrapped__"):
        popen._launch = _deaf(popen._launch)


def _deaf(launch: Callable[..., Any]) -> Callable[..., Any]:
    """``Popen._launch`` whose child ignores SIGINT from its first instruction on."""

    @functools.wraps(launch)
    def launch_deaf(*args: Any) -> Any:
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is None:
            return launch(*args)
        own = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which an exec keeps
        try:
            return launch(*args)
        finally:
            signal.signal(signal.SIGINT, own)

    return launch_deaf
