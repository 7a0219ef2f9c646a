"""A Slurm of its own: one controller and three hosts, all on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kt_kernel.host.addresses import free_port
from tests.cluster.processes import end_processes

DAEMONS = ("munged", "slurmctld", "slurmd")
HOSTS = ("n1", "n2", "n3")
MUNGE_FILES = {
    "key-file": "munge.key",
    "pid-file": "munge.pid",
    "socket": "munge.sock",
    "log-file": "munge.log",
    "seed-file": "munge.seed",
}
# A job that begins again waits until what it was started with has expired: 10 s instead of 120.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=10
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=60
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
HOST = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=6000\n"
)


@dataclass(frozen=True)
class Slurm:
    """A running cluster."""

    root: Path

    def run(self, *command: str, **more: str) -> str:
        """A client's command; its output."""
        environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), **more}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job, or of each task of an array that has begun, as in ``COMPLETED``."""
        found = self.run("scontrol", "--oneliner", "show", "job", job)
        states = {word.removeprefix("JobState=") for word in found.split() if "JobState=" in word}
        return " ".join(sorted(states))

    def wait(self, what: str, there: Callable[[], bool], seconds: float = 200.0) -> None:
        """Until it is there."""
        deadline = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """What the daemons and the jobs said."""
        logs = sorted([*self.root.glob("*.log"), *self.root.glob("logs/*")])
        return "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster; without Slurm or root's rights, the tests are skipped and say why."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs {' and '.join(missing) or 'root'} (packages slurmctld, slurmd, munge)")
    root = tmp_path_factory.mktemp("slurm")
    text = CONFIGURATION.format(root=root, controller=free_port())
    text += "".join(HOST.format(name=name, port=free_port()) for name in HOSTS)
    (root / "slurm.conf").write_text(text)
    (root / "munge.key").write_bytes(os.urandom(256))
    (root / "munge.key").chmod(0o400)
    for name in ("state", *(f"spool-{host}" for host in HOSTS)):
        (root / name).mkdir()
    munge = [f"--{name}={root / file}" for name, file in MUNGE_FILES.items()]
    configuration = ["-D", "-f", str(root / "slurm.conf")]
    commands = [["munged", "--foreground", "--force", *munge], ["slurmctld", *configuration]]
    commands += [["slurmd", *configuration, "-N", host] for host in HOSTS]
    environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
    started: list[subprocess.Popen[bytes]] = []
    cluster = Slurm(root)
    try:
        for command in commands:
            with (root / f"{command[0]}.out.log").open("ab") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                cluster.wait("munged", (root / "munge.sock").exists, 20)
        states = ("sinfo", "--noheader", "--format=%t %D")
        cluster.wait("the hosts", lambda: cluster.run(*states).split() == ["idle", "3"], 60)
        yield cluster
    finally:
        try:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
            for process in reversed(started):
                process.wait(30)
        finally:  # the jobs of a test that failed; with the daemons gone, none begins again
            end_processes("SLURM_CONF", str(root / "slurm.conf"))
