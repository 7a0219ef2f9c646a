"""Saves what a server counts, while it runs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kt_kernel.errors import UserError
from kt_kernel.placement.counts import Model
from kt_kernel.placement.counts_file import add_counts

logger = logging.getLogger(__name__)

#: Environment variable that names the file. ``entrypoint.py serve`` sets it; users set
#: ``KT_EXPERT_COUNTS``.
COUNTS_VARIABLE = "_KT_EXPERT_COUNTS_FILE"
#: A kill loses what was counted since the last save. The first comes soon, for servers that do not
#: live long.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0


class CountsSaver:
    """Adds to a file what layers count from now on.

    Args:
        path: of the file.
        model: whose counts they are.
        layers: by the decoder layer's index, what returns int64 [E] by the checkpoint's expert.
    """

    def __init__(
        self, path: Path, model: Model, layers: Mapping[int, Callable[[], NDArray[np.int64]]]
    ) -> None:
        self._path, self._model, self._layers = path, model, layers
        self._saved = self._read()

    def _read(self) -> dict[int, NDArray[np.int64]]:
        return {layer: read() for layer, read in self._layers.items()}

    def save(self) -> None:
        """Add what is new, if anything is.

        Raises:
            UserError: the file cannot be written, or holds something else.
        """
        now = self._read()
        new = {layer: counts - self._saved[layer] for layer, counts in now.items()}
        if any(counts.any() for counts in new.values()):
            add_counts(self._path, self._model, new)
            self._saved = now

    def keep_saving(self) -> None:
        """Save now and then until the process ends, or until it cannot: a warning says why."""
        pause = FIRST_PAUSE
        while True:
            time.sleep(pause)
            try:
                self.save()
            except UserError as error:
                logger.warning("kt_kernel: how often experts are used is not saved: %s", error)
                return
            pause = min(2 * pause, LONGEST_PAUSE)


def start_saving(
    model: Model, layers: Mapping[int, Callable[[], NDArray[np.int64]]]
) -> CountsSaver | None:
    """Save in the background to the file that ``COUNTS_VARIABLE`` names, if it does."""
    if not (path := os.environ.get(COUNTS_VARIABLE)):
        return None
    saver = CountsSaver(Path(path), model, layers)
    logger.info("kt_kernel: how often each expert is used is added up in %s", path)
    threading.Thread(target=saver.keep_saving, name="expert-counts", daemon=True).start()
    return saver
