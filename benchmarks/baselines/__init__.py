"""The engines that ours is measured against, each in a folder of its own.

    python -m benchmarks.baselines prepare [--python-version 3.12] [--output DIR]

- ``kt-kernel`` (upstream's, from PyPI): its wheel's extension modules, unpacked. It is a package
  called ``kt_kernel``, as ours is, so the two never meet in one process.
- ``ggml`` (llama.cpp's kernels): compiled from the source package of ``llama-cpp-python``.

The folder needs no network where it is used, and both are built for many CPUs, so it may be copied
to another x86-64 machine with the Python version it was prepared for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.limits import CACHE, probe_name
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import read_fields

MANIFEST = "baselines.json"


def default_folder(python_version: str | None = None) -> Path:
    """Where baselines for a Python version (this one by default) are kept, outside of git."""
    return CACHE / f"baselines-{python_version or this_python()}"


def this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Baselines:
    """A prepared folder.

    Args:
        folder: the folder, absolute.
        versions: name of the package -> version.
    """

    folder: Path
    versions: dict[str, str]

    @property
    def kt_kernel(self) -> Path:
        return self.folder / "kt-kernel"

    @property
    def ggml(self) -> Path:
        return self.folder / "ggml"

    @property
    def probe(self) -> Path | None:
        """The compiled probe of the limits, unless its source has changed since."""
        path = self.folder / probe_name()
        return path if path.is_file() else None

    @classmethod
    def open(cls, folder: Path) -> Baselines:
        """Open a prepared folder.

        Raises:
            BenchmarkError: no such folder, or one for another Python version.
        """
        try:
            manifest = read_fields(folder / MANIFEST)
            python, versions = manifest.text("python"), manifest.texts("versions")
        except UserError as error:
            raise BenchmarkError(
                f"{error}: make it with 'python -m benchmarks.baselines prepare --output {folder}'"
            ) from None
        if python != this_python():
            raise BenchmarkError(
                f"{folder} was prepared for Python {python}, this is {this_python()}: "
                f"prepare another with --python-version {this_python()}"
            )
        return cls(folder.resolve(), versions)
