"""Layer calls that are captured into CUDA graphs: what they share in this process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
import time
from pathlib import Path

import torch

from kt_kernel import _ext
from kt_kernel.errors import UserError

logger = logging.getLogger(__name__)

#: Seconds after which a replayed call counts as hanging; the slowest prefill chunk takes a minute.
CALL_LIMIT = 300.0
_CHECK_INTERVAL = 1.0
#: Share of the limit for which the watching thread does not run only where nothing runs.
_FROZEN = 0.1

#: For measuring: 0 leaves the calls of CUDA graphs to host functions.
FLAGS_VARIABLE = "_KT_STREAM_FLAGS"
#: As the loader knows it: CUDA's runtime has loaded it.
_DRIVER = "libcuda.so.1"
#: What it lacks, and not what did not happen in time.
_REFUSED = re.compile(r"^the CUDA driver \S+ has no |^cuStream\w+ failed: ")

#: What ``stream_context`` has made: nothing or one.
_contexts: list[_ext.StreamContext] = []


def cuda_runtime_path(maps: Path = Path("/proc/self/maps")) -> str:
    """Path of the CUDA runtime that this process has loaded, which is torch's.

    Raises:
        UserError: none is loaded.
    """
    found = re.search(
        r"\s(/\S*/libcudart\.so\S*)$", maps.read_text("utf-8", "surrogateescape"), re.MULTILINE
    )
    if found is None:
        raise UserError(
            "no libcudart.so is loaded in this process: expected a PyTorch built for CUDA that "
            "links it; start SGLang without CUDA graphs"
        )
    return found[1]


@functools.cache
def stream_context() -> _ext.StreamContext:
    """Pinned memory and the first failure of all layers' calls, watched by a thread.

    Raises:
        UserError: as :func:`cuda_runtime_path`.
    """
    context = _ext.StreamContext(cuda_runtime_path())
    _use_flags(context)
    _contexts.append(context)
    threading.Thread(target=watch, args=(context,), name="kt-watch", daemon=True).start()
    return context


def _use_flags(context: _ext.StreamContext) -> None:
    if os.environ.get(FLAGS_VARIABLE) == "0":
        return
    try:
        context.use_flags(_DRIVER)
    except RuntimeError as error:
        logger.warning(
            "kt_kernel: CUDA graphs call the experts by host functions, some 0.13 ms slower a "
            "layer than by words of pinned memory: %s%s",
            error,
            "; a newer NVIDIA driver may help" if _REFUSED.search(str(error)) else "",
        )


def prepare() -> None:
    """Make the context ahead of any capture, where this process uses a card.

    Without a CUDA runtime that can be found this does nothing: a capture says so.
    """
    if torch.cuda.is_initialized():
        with contextlib.suppress(UserError):
            stream_context()


def check_earlier_calls() -> None:
    """Raise what went wrong in a call on a stream, of any layer: a graph cannot raise it.

    Raises:
        RuntimeError: names the layer.
    """
    for context in _contexts:
        if failure := context.failure:
            raise RuntimeError(f"an earlier call failed: {failure}")


def watch(
    context: _ext.StreamContext, limit: float = CALL_LIMIT, interval: float = _CHECK_INTERVAL
) -> None:
    """End calls that hang, and log the first failure: a replayed graph calls no Python.

    A process that was frozen (SIGSTOP, ``docker pause``, a suspended VM) computed nothing
    meanwhile: calls get the time back for which this thread, too, did not run.
    """
    lost = lost_until = 0.0
    before = time.monotonic()
    while not context.failure:
        now = time.monotonic()
        pause = now - before - interval
        before = now
        if pause > limit * _FROZEN:
            lost += pause
            lost_until = now + limit + lost
        elif now > lost_until:  # the calls of then are over
            lost = 0.0
        context.end_overdue(limit + lost)
        time.sleep(interval)
    logger.critical(
        "kt_kernel: %s: an output is wrong from there on, and the next call from Python fails; "
        "start the server again",
        context.failure,
    )
