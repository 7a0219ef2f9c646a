"""Checks of the output that are made before the first byte is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.files.units import gigabytes


def check_output_path(input_path: Path, output: Path) -> None:
    """Check that the output can be a directory of its own.

    Raises:
        UserError: it is the input directory, or it exists and is not a directory.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, expected a directory or nothing yet")
    if output.exists() and input_path.exists() and output.samefile(input_path):
        raise UserError(
            f"--output and --input-path are the same directory, {output}: the packed files need "
            f"one of their own"
        )


def check_free_space(output: Path, needed: int) -> int:
    """Check that ``needed`` more bytes fit beside what ``output`` holds already.

    Returns:
        The free bytes of the file system.

    Raises:
        UserError: says how much is free and how much is needed.
    """
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"not enough free space for --output {output}: expected at least {gigabytes(needed)}, "
            f"found {gigabytes(free)}; free some or choose another file system"
        )
    return free
