"""What a cluster of a test started is ended with it."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from tests.cluster.processes import end_processes, is_alive

#: A step in a session of its own, and a server of its job, which has another environment.
STEP = """
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    child = subprocess.Popen(["sleep", "600"], env={}, stdout=subprocess.DEVNULL)
    print(os.getpid(), child.pid, flush=True)
    os.close(1)
    child.wait()
"""


def test_a_job_does_not_outlive_the_cluster() -> None:
    """Of a test that failed: nothing that is still there is its parent."""
    value = f"/no/slurm.conf.{os.getpid()}"
    started = subprocess.run(
        [sys.executable, "-c", STEP],
        env={**os.environ, "SLURM_CONF": value},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    job = [psutil.Process(int(pid)) for pid in started.stdout.split()]
    assert len(job) == 2
    end_processes("SLURM_CONF", f"{value}0")  # another cluster's
    assert all(map(is_alive, job))
    end_processes("SLURM_CONF", value)
    assert not any(map(is_alive, job))
