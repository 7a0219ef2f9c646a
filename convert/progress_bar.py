"""What a conversion shows: a bar on a terminal, and lines that a log keeps."""

from __future__ import annotations

import sys

from tqdm import tqdm

from kt_kernel.errors import one_line


class Progress:
    """Context manager; lines go to stdout, the bar to stderr if that is a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        line = one_line(line)  # names of files may hold what stdout cannot write
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def start(self, matrices: int) -> None:
        """So many matrices are to be converted."""
        if matrices and sys.stderr.isatty():
            self._bar = tqdm(total=matrices, unit=" matrices", smoothing=0.02, file=sys.stderr)

    def step(self, matrices: int = 1) -> None:
        """So many more are converted; may be called from any thread."""
        if self._bar is not None:
            self._bar.update(matrices)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
