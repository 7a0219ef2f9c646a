"""Every bound function answers bad arguments with an exception: a crash would end a server."""

from __future__ import annotations

import subprocess
import sys

from tests.compiler import ROOT
from tests.csrc.stream import fake_cuda


def test_bad_arguments_of_every_bound_function() -> None:
    """In a process of its own, which must also end well while workers are at a call."""
    # The runtime must be loaded before a context looks for it.
    program = (
        "import ctypes, sys; from tests.kt_kernel import bound_arguments; "
        "ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL); bound_arguments.main()"
    )
    library = fake_cuda.library()._name
    result = subprocess.run(
        [sys.executable, "-c", program, library], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout == "never called:\ndone\n"
    assert result.returncode == 0
