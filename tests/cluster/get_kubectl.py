"""A kubectl that knows the kustomize of these manifests: ``python -m tests.cluster.get_kubectl``.

The machine's own if it is new enough (Debian bookworm's is not: it knows no components), else that
of Debian's trixie, unpacked into ``.cache/kubectl``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docker.engine import REPOSITORY, EngineUnavailable, unpack_trixie

CACHE = REPOSITORY / ".cache/kubectl"
CACHED = CACHE / "unpacked/usr/bin/kubectl"
KUSTOMIZE = 5


def find() -> str | None:
    """Path of a kubectl that will do, if there is one."""
    for name in (shutil.which("kubectl"), str(CACHED)):
        if name is not None and Path(name).exists() and _kustomize(name) >= KUSTOMIZE:
            return name
    return None


def _kustomize(kubectl: str) -> int:
    """Major version of the kustomize in it; 0 where it does not say, as before 1.24."""
    told = subprocess.run(
        [kubectl, "version", "--client", "--output=json"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return int(json.loads(told.stdout)["kustomizeVersion"].lstrip("v").split(".")[0])
    except (ValueError, KeyError):
        return 0


def main() -> int:
    """Get one unless it is there; returns the exit status."""
    if find() is None:
        try:
            unpack_trixie(CACHE, "kubectl")
        except EngineUnavailable as error:
            print(f"error: no kubectl: {error}", file=sys.stderr)
            return 2
    print(find())
    return 0


if __name__ == "__main__":
    sys.exit(main())
