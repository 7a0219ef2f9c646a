"""How far the loading of a model's layers is, in one line for each layer."""

from __future__ import annotations

import functools
import json
import os
from contextlib import suppress
from pathlib import Path

from kt_kernel import packed
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import read_fields

#: Environment variable that names a file for the number of layers loaded so far and of the model.
#: ``entrypoint.py serve`` sets it, and its ``health`` reads the file; no setting for users.
PROGRESS_VARIABLE = "_KT_LOAD_PROGRESS_FILE"


class LoadProgress:
    """Counts the layers that one process loads from one folder.

    Args:
        total: layers of the model; 0 if unknown.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done: set[int] = set()
        self._first = 0.0

    def line(self, layer_idx: int, nbytes: int, started: float, ended: float) -> str:
        """Note that a layer has been loaded and say so.

        Args:
            layer_idx: index of the decoder layer.
            nbytes: of its weights in memory.
            started, ended: seconds on a monotonic clock.
        """
        if not self.done:
            self._first = started
        self.done.add(layer_idx)
        self._publish()
        seconds = max(ended - started, 1e-9)
        text = f"layer {layer_idx}: {len(self.done)}"
        if self.total:
            text += f" of {self.total}"
        # Always GB: benchmarks/rehearsal/variant.py reads it.
        text += f", {nbytes / 1e9:.1f} GB in {seconds:.1f} s, {nbytes / seconds / 1e9:.1f} GB/s"
        left = self.total - len(self.done)
        if left > 0:
            # Other work between the layers counts: it will take place between those to come, too.
            text += f", ETA {(ended - self._first) / len(self.done) * left:.0f} s"
        return text

    def _publish(self) -> None:
        """Write the file of ``PROGRESS_VARIABLE``, whole or not at all; best effort."""
        name = os.environ.get(PROGRESS_VARIABLE)
        if not name or not self.total:
            return
        partial = Path(f"{name}.partial")
        with suppress(OSError):
            partial.write_text(json.dumps({"done": len(self.done), "total": self.total}))
            partial.replace(name)


@functools.cache
def load_progress(folder: Path) -> LoadProgress:
    """The progress of this process's layers from a folder of packed weights."""
    return LoadProgress(_layers_of(folder / packed.MANIFEST_NAME))


def _layers_of(manifest: Path) -> int:
    """MoE layers that a manifest names; 0 if it cannot tell, since loading needs no manifest."""
    try:
        return len(read_fields(manifest).inner("model").array("moe_layers"))
    except UserError:
        return 0
