"""How a server ends: what its main process says of it, on what its other processes end."""

from __future__ import annotations

import importlib
from typing import Any

from kt_kernel.server_phase import ENDING, READY, tell_phase


def tell_ready(result: Any, *_: Any, **__: Any) -> None:
    """After ``_wait_and_warmup``, which sets the server's status where it succeeds."""
    server = importlib.import_module("sglang.srt.entrypoints.http_server")
    if server._global_state.tokenizer_manager.server_status.name == "Up":
        tell_phase(READY)


def tell_ending(*_: Any, **__: Any) -> None:
    """Before ``SignalHandler.sigterm_handler``: what ends from here on was told to."""
    tell_phase(ENDING)
