"""Deletes what packages bring and nothing here loads, 0.6 GB: ``python prune.py SITE_PACKAGES``.

SGLang's own files stay as they are, and licence texts everywhere. What goes also leaves the RECORD
of its package, which then still says what is there.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

#: Files and folders below site-packages; a package that is not there, or no longer has them, is no
#: error.
UNUSED = (
    # Archives to link against NVIDIA's profiler; Triton loads its shared library.
    "triton/backends/nvidia/lib/cupti*/*.a",
    # The CUDA 12 half of a compiler that takes the newest that it finds; torch here is CUDA 13's.
    "nvidia_cutlass_dsl/cu12",
    "nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir*cu12*",
    # The dense solver over several GPUs; no library links to it.
    "nvidia/cu13/lib/libcusolverMg.so.*",
    # Tests of the large Python libraries.
    *(f"{package}/**/tests" for package in ("pandas", "pyarrow", "scipy")),
)
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|copyright)", re.IGNORECASE)


def unused_files(site_packages: Path) -> Iterator[Path]:
    """Every file that goes; links are not followed."""
    for pattern in UNUSED:
        for found in site_packages.glob(pattern):
            if found.is_symlink() or not found.is_dir():
                yield found
            else:
                yield from (
                    Path(folder, name) for folder, _, names in os.walk(found) for name in names
                )


def remove(site_packages: Path) -> set[Path]:
    """Delete the files and the folders that they leave empty; the files."""
    removed = set()
    for path in set(unused_files(site_packages)):
        if not _LICENCE.match(path.name):
            path.unlink()
            removed.add(path)
    for folder in sorted({path.parent for path in removed}, reverse=True):
        while folder != site_packages and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
    return removed


def correct_records(site_packages: Path, removed: set[Path]) -> None:
    """Take the files out of the RECORDs that name them."""
    for record in sorted(site_packages.glob("*.dist-info/RECORD")):
        with record.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        kept = [row for row in rows if row and site_packages / row[0] not in removed]
        if len(kept) < len(rows):
            with record.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(kept)


def main() -> int:
    """Prune; says how much went."""
    parser = argparse.ArgumentParser(description="Delete files that nothing here loads.")
    parser.add_argument("site_packages", type=Path, metavar="SITE_PACKAGES")
    site_packages = parser.parse_args().site_packages.absolute()
    if not site_packages.is_dir():
        parser.error(f"{site_packages} is no directory: expected that of the Python packages")
    removed = remove(site_packages)
    correct_records(site_packages, removed)
    print(f"removed {len(removed)} files", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
