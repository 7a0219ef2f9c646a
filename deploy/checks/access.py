"""Check of the directories that the stages write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deploy.checks.result import Finding, fail_unless
from deploy.checks.situation import Situation, check
from deploy.hub.marker import is_whole_model
from deploy.settings.row import AUTO
from kt_kernel.files.folders import nearest_existing

#: Variables of directories in which the stages and SGLang's packages keep what they make. Of one
#: that an earlier user left the server dies when it compiles its first kernel.
CACHES = {
    "XDG_CACHE_HOME": "",
    "HF_HOME": "",
    "TRITON_CACHE_DIR": "",
    "FLASHINFER_WORKSPACE_BASE": ".cache/flashinfer",
}


@check("write-access", serve=False)
def check_write_access(situation: Situation) -> Iterator[Finding]:
    """This user may write where something is still to be written: results, caches."""
    from convert.manifest_file import are_complete  # it loads numpy

    written = []
    if not is_whole_model(situation.model_path):
        written.append(("KT_MODEL_PATH", situation.model_path))
    if not are_complete(situation.weight_path):
        written.append(("KT_WEIGHT_PATH", situation.weight_path))
    for name in ("KT_ENDPOINT_PATH", "KT_EXPERT_COUNTS"):
        if (path := situation.values[name]) not in (None, AUTO):
            written.append((name, Path(path).parent))
    for name, below in CACHES.items():
        if value := situation.environment.get(name):
            written.append((name, Path(value) / below))
    told = set()
    for name, path in written:
        folder = nearest_existing(path)
        if folder in told:
            continue
        told.add(folder)
        found = folder.stat()
        user = f"{os.getuid()}:{os.getgid()}"
        yield fail_unless(
            folder.is_dir() and os.access(folder, os.W_OK | os.X_OK),
            f"{name} {path} that user {user} can write to",
            f"{folder} of {found.st_uid}:{found.st_gid}, mode {found.st_mode & 0o7777:o}",
            f"on the host, `chown -R {user}` that directory, or run as its owner (in containers "
            f"RUN_AS={found.st_uid}:{found.st_gid})",
        )
