"""Checks of what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator

from deploy.checks.result import Finding, Status
from deploy.checks.situation import Situation, check
from kt_kernel.installed import how_to_install
from kt_kernel.sglang_plugin.refusal import TESTED_VERSIONS

SGLANG_VERSION = TESTED_VERSIONS[-1]


@check("sglang")
def check_sglang(_: Situation) -> Iterator[Finding]:
    """SGLang in the version this was made for."""
    expected = f"SGLang {SGLANG_VERSION}"
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(Status.FAIL, expected, f"none for {sys.executable}", how_to_install())
        return
    if version == SGLANG_VERSION:
        yield Finding(Status.PASS, expected, version)
    else:
        todo = f"other versions are not tested: {how_to_install()}"
        yield Finding(Status.WARN, expected, version, todo)


@check("kernel")
def check_kernel(_: Situation) -> Iterator[Finding]:
    """The compiled kernel."""
    expected = "the compiled extension of kt_kernel"
    if importlib.util.find_spec("kt_kernel._ext") is not None:
        yield Finding(Status.PASS, expected, "kt_kernel._ext")
    else:
        yield Finding(Status.FAIL, expected, f"none for {sys.executable}", how_to_install())
