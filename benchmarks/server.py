"""Start the server as users do, ask it things, and leave no process behind."""

import functools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from deploy.settings.variables import is_for
from kt_kernel import program
from kt_kernel.host.addresses import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
START_LIMIT = 400.0
"""Seconds; a start takes 25 to 45 on an idle machine, several times that on a busy one."""


def tutorial_command() -> list[str]:
    """``entrypoint.py serve`` with the tutorial's settings."""
    env_file = str(REPOSITORY / "env" / "tutorial.env")
    return [sys.executable, str(REPOSITORY / "entrypoint.py"), "--env-file", env_file, "serve"]


def end_with_parent() -> Callable[[], None]:
    """What a child runs before its program: it gets SIGTERM when this process ends, however."""
    return functools.partial(program.end_with_parent, os.getpid(), signal.SIGTERM)


def kill_group(group: int, patience: float = 20.0) -> None:
    """End every process of the group, asking first; returns when none is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not group_members(group):
                return
            time.sleep(0.2)
    raise RuntimeError(f"process group {group} outlives SIGKILL: {group_members(group)}")


def group_members(group: int) -> list[int]:
    """Ids of the processes in the group that still run (not zombies)."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (name) state parent group ...; the name may hold spaces and brackets.
            state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(process_group) == group and state != "Z":
            members.append(int(entry.name))
    return members


@dataclass
class Server:
    """A running server; use it in ``with``, which waits until it is ready.

    settings: environment on top of this process's; KT_HOST, KT_PORT and KT_ADMIN_KEY are set here.
    """

    settings: Mapping[str, str]
    log: Path
    command: list[str] = field(default_factory=tutorial_command)
    port: int = field(default_factory=free_port)
    start_limit: float = START_LIMIT
    start_seconds: float = 0.0
    admin_key: str = field(default_factory=lambda: secrets.token_hex(16))

    def __enter__(self) -> Self:
        started = time.monotonic()
        self._launch()
        try:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise RuntimeError(
                        f"the server ended with status {self._process.returncode}:\n{self.tail()}"
                    )
                if time.monotonic() - started > self.start_limit:
                    raise TimeoutError(f"no server after {self.start_limit:.0f} s:\n{self.tail()}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run_to_end(self) -> int:
        """Start a server that is expected to refuse; return its exit status.

        Raises TimeoutError if it has not ended, and RuntimeError if it left processes.
        """
        self._launch()
        try:
            status = self._process.wait(self.start_limit)
            deadline = time.monotonic() + 15
            while (left := group_members(self._process.pid)) and time.monotonic() < deadline:
                time.sleep(0.2)
            if left:
                raise RuntimeError(f"the server left {len(left)} processes:\n{self.tail()}")
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the server did not end:\n{self.tail()}") from error
        finally:
            self.stop()
        return status

    def stop(self) -> None:
        kill_group(self._process.pid)
        self._process.wait()

    @property
    def admin(self) -> dict[str, str]:
        """Headers of a request to a route that changes the server."""
        return {"Authorization": f"Bearer {self.admin_key}"}

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def memory_bytes(self) -> int:
        """Resident memory of the server's processes; shared pages count once."""
        total = 0
        for process in group_members(self._process.pid):
            try:
                text = Path(f"/proc/{process}/smaps_rollup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile: compilers come and go
            for line in text.splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def held(self) -> dict[str, int]:
        """``threads`` and open ``files`` of the server's processes."""
        threads = files = 0
        for process in group_members(self._process.pid):
            folder = Path(f"/proc/{process}")
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                threads += len(list((folder / "task").iterdir()))
                files += len(list((folder / "fd").iterdir()))
        return {"threads": threads, "files": files}

    def generate(self, input_ids: list[int], new_tokens: int, **options: Any) -> dict[str, Any]:
        """SGLang's native endpoint, greedy, ``new_tokens`` whatever they are."""
        response = httpx.post(
            f"http://127.0.0.1:{self.port}/generate",
            json={
                "input_ids": input_ids,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                },
                **options,
            },
            timeout=300,
            trust_env=False,
        )
        response.raise_for_status()
        result: dict[str, Any] = response.json()
        return result

    def metrics(self) -> str:
        """What Prometheus gets."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        return httpx.get(url, timeout=30, trust_env=False).raise_for_status().text

    def _launch(self) -> None:
        shell = {name: value for name, value in os.environ.items() if is_for(name, "serve")}
        # No run is to count into a user's file.
        counts = {"KT_EXPERT_COUNTS": str(self.log.with_suffix(".counts.json"))}
        environment = {**shell, **counts, **self.settings}
        environment |= {"KT_HOST": "127.0.0.1", "KT_PORT": str(self.port)}
        environment["KT_ADMIN_KEY"] = self.admin_key
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=environment,
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def _is_ready(self) -> bool:
        try:
            response = httpx.get(
                f"http://127.0.0.1:{self.port}/health", timeout=30, trust_env=False
            )
        except httpx.TransportError:
            return False
        return response.status_code == 200
