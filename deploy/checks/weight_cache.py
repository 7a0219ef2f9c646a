"""Check of the local copy of the packed weights."""

from __future__ import annotations

import os
from collections.abc import Iterator

from deploy.checks.result import Finding, Status, fail_unless
from deploy.checks.situation import Situation, check
from kt_kernel.files.folders import nearest_existing
from kt_kernel.files.units import gigabytes


@check("weight-cache", sized=True, host=False)
def check_weight_cache(situation: Situation) -> Iterator[Finding]:
    """KT_WEIGHT_CACHE can be written, has room, and is another disk than the weights'."""
    from deploy.copies.weight_cache import room  # it loads numpy

    cache = situation.values["KT_WEIGHT_CACHE"]
    if cache is None:
        return
    needed, available = room(
        cache, situation.weight_path, situation.needs.weights(situation.values)
    )
    if needed == 0:
        yield Finding(Status.PASS, f"the packed weights in KT_WEIGHT_CACHE {cache}", "all of them")
        return
    folder = nearest_existing(cache)
    expected = f"{gigabytes(needed)} in a KT_WEIGHT_CACHE {cache} that can be written"
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        found = f"that user {os.getuid()} cannot write to {folder}"
        yield Finding(Status.FAIL, expected, found, "choose a directory that it can write to")
        return
    yield fail_unless(
        available >= needed,
        expected,
        f"{gigabytes(available)} free, with the sets that no server uses",
        "free some, choose another disk or unset it",
    )
    if folder.stat().st_dev == nearest_existing(situation.weight_path).stat().st_dev:
        yield Finding(
            Status.WARN,
            f"a KT_WEIGHT_CACHE {cache} on a disk of this host alone",
            "the file system that has KT_WEIGHT_PATH",
            "unset it: the copy costs its space and makes nothing faster",
        )
