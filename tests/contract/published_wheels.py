"""The SGLang wheels whose calls we promise to accept: pinned, downloaded once, cached."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "wheels"


@dataclass(frozen=True)
class PublishedWheel:
    """One file of a package index: what to ask pip for and what must come back."""

    project: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.project}-{self.version}"

    def fetch(self) -> Path:
        """Return the wheel's path in the cache, downloading it if it is not there.

        Raises RuntimeError if it can be had from neither, so that a test without
        network and cache fails instead of passing on nothing.
        """
        folder = CACHE / str(self)
        for wheel in folder.glob("*.whl"):
            if hashlib.sha256(wheel.read_bytes()).hexdigest() == self.sha256:
                return wheel
            wheel.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.project}=={self.version} --hash=sha256:{self.sha256}\n")
        # The wheels are read, not installed: ask for the one that was pinned,
        # whatever interpreter and glibc run the tests.
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
            *("--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"),
            *("--platform", "manylinux_2_34_x86_64", "--platform", "manylinux_2_35_x86_64"),
            *("--dest", str(folder), "--requirement", str(requirements), "--quiet"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            raise RuntimeError(
                f"{self} is neither in {CACHE} nor to be downloaded, so the contract cannot be "
                f"tested: {result.stderr.strip()}"
            )
        return wheels[0]


STOCK_WHEELS = (
    PublishedWheel(
        "sglang", "0.5.6", "c32b6a5bafcda41c2f299ed4a1fbe8401946076b4e010fe8feb5b8a9712bf66b"
    ),
    PublishedWheel(
        "sglang", "0.5.16", "d5f345a18953dd35df568ac56bdcb7f5ee910ab39efea4469b714556d1070713"
    ),
    PublishedWheel(
        "sglang", "0.5.23", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937"
    ),
)
FORK_WHEEL = PublishedWheel(
    "sglang-kt", "0.7.2", "f24dfb7c555d3d678e4fa12fc7d03edee332b41141bb42086d0af44412f38f2c"
)
PLUGIN_WHEELS = STOCK_WHEELS[1:]
"""Those whose plugin interface our SGLang plugin is written for."""
