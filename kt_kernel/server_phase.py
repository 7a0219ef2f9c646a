"""What a server says of itself in a file: that it is ready, that it was told to end.

``entrypoint.py serve`` names the directory (:data:`kt_kernel.load_progress.PROGRESS_VARIABLE`), the
server's main process writes, and ``health`` reads it when nobody answers any more.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.files.foreign import read_file
from kt_kernel.load_progress import PROGRESS_VARIABLE

READY, ENDING = "ready", "ending"
FILE_NAME = "serve-phase"


def tell_phase(phase: str) -> None:
    """Say :data:`READY` or :data:`ENDING`; best effort, and nothing where nobody asked for it."""
    name = os.environ.get(PROGRESS_VARIABLE)
    if not name:
        return
    path = Path(name).with_name(FILE_NAME)
    partial = path.with_name(f"{FILE_NAME}.partial")
    with suppress(OSError):
        partial.write_text(phase)
        partial.replace(path)


def told_phase(directory: Path) -> str | None:
    """What the server said last; None if nothing that it can say."""
    try:
        phase = read_file(directory / FILE_NAME).decode(errors="replace")
    except UserError:
        return None
    return phase if phase in (READY, ENDING) else None
