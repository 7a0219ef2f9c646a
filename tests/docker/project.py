"""One compose project of a test: started, asked, read and removed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import docker
from kt_kernel.host.addresses import free_port
from tests.docker.engine import REPOSITORY, Engine, run

CPU = ("docker-compose.yml", "compose/cpu.yml")
READY_SECONDS = 420.0
"""A start takes about 45 s on an idle machine of two cores."""


@dataclass
class Project:
    """A compose project with a name, files and variables of its own.

    Attributes:
        variables: what a user would have in ``.env``.
        files: compose files, relative to the repository.
        told: answers of the status service, where a fixture watched it.
    """

    engine: Engine
    name: str
    variables: Mapping[str, str]
    files: Iterable[str] = CPU
    port: int = 30000
    told: list[tuple[int, str]] = field(default_factory=list)
    client: docker.DockerClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = docker.DockerClient(base_url=self.engine.url, timeout=120)
        # Each project has a status service; projects live at the same time.
        self.variables = {"KT_STATUS_PORT": str(free_port()), **self.variables}

    def with_files(self, *files: str, **variables: str) -> Project:
        """The same project with further override files and variables."""
        return Project(
            self.engine,
            self.name,
            {**self.variables, **variables},
            (*self.files, *files),
            self.port,
        )

    def environment(self) -> dict[str, str]:
        """The engine's variables and the project's; the caller's own settings stay out."""
        return {
            "SETTINGS_FILE": os.devnull,
            **self.engine.environment,
            **self.variables,
            "KT_PORT": str(self.port),
        }

    def make(self, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run ``make`` in the repository, as this project and without the developer's .env."""
        own = {"COMPOSE_PROJECT_NAME": self.name, "COMPOSE_ENV_FILES": os.devnull}
        return run(["make", *words], {**own, **self.environment()}, timeout=timeout)

    def compose(
        self, *arguments: str, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run ``docker compose`` in the repository, without a .env file of the developer's."""
        files = [word for file in self.files for word in ("-f", file)]
        return run(
            ["docker", "compose", "--env-file", os.devnull, "-p", self.name, *files, *arguments],
            self.environment(),
            check=check,
            timeout=timeout,
        )

    def up(
        self, *services: str, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """``up -d``: returns when the last service was started, or preflight failed."""
        return self.compose("up", "-d", "--no-build", *services, check=check, timeout=timeout)

    def preflight(self, **variables: str) -> list[str]:
        """What a container that is thrown away says against these settings."""
        words = ("run", "--rm", "--no-deps", "-T", "preflight", "check", "--first")
        result = self.with_files(**variables).compose(*words, check=False)
        assert result.returncode != 0, result.stdout
        lines = (result.stdout + result.stderr).splitlines()
        return [line for line in lines if line.startswith(("FAIL:", "error:", "Error "))]

    def down(self, volumes: bool = False) -> None:
        self.compose("down", "--remove-orphans", *(["-v"] if volumes else []))

    def container(self, service: str, number: int = 1) -> Any:
        """The container of a service (docker SDK)."""
        return self.client.containers.get(f"{self.name}-{service}-{number}")

    def states(self) -> dict[str, str]:
        """State of each service that has a container: running, created, exited (CODE)."""
        found = {}
        label = f"com.docker.compose.project={self.name}"
        for container in self.client.containers.list(all=True, filters={"label": label}):
            state = container.attrs["State"]
            code = f" ({state['ExitCode']})" if state["Status"] == "exited" else ""
            found[container.labels["com.docker.compose.service"]] = state["Status"] + code
        return found

    def logs(self, service: str, number: int = 1) -> str:
        return str(self.container(service, number).logs().decode(errors="replace"))

    def wait_until_told(self, pattern: str, seconds: float = 120) -> str:
        """Until the status service says what the pattern matches as a whole; what it says."""
        deadline = time.monotonic() + seconds
        told = ""
        while not re.fullmatch(pattern, told):
            assert time.monotonic() < deadline, (pattern, told, self.states())
            time.sleep(0.05)
            with contextlib.suppress(httpx.TransportError):
                told = self.status()[1]
        return told

    def errors(self, service: str) -> list[str]:
        """The lines of a service's log that tell a mistake."""
        found = [re.sub(r"^\[[-: 0-9]+\] ", "", line) for line in self.logs(service).splitlines()]
        return [line for line in found if line.startswith("error:")]

    def volume(self, name: str) -> Path:
        """Where a volume is on this machine."""
        return Path(self.client.volumes.get(f"{self.name}_{name}").attrs["Mountpoint"])

    def digests(self, volume: str) -> dict[str, str]:
        """SHA-256 of each file of a volume, by its path."""
        root = self.volume(volume)
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file() and ".cache" not in path.relative_to(root).parts
        }

    def wait_until_healthy(self, service: str = "serve", number: int = 1) -> float:
        """Seconds until the service's health check succeeded."""
        started = time.monotonic()
        while time.monotonic() - started < READY_SECONDS:
            container = self.container(service, number)
            state = container.attrs["State"]
            if state["Status"] not in ("running", "created"):
                raise AssertionError(
                    f"{service} is {state['Status']}:\n{self.tail(service, number)}"
                )
            if state.get("Health", {}).get("Status") == "healthy":
                return time.monotonic() - started
            time.sleep(1)
        raise AssertionError(f"{service} is not healthy:\n{self.tail(service, number)}")

    def crash(self, service: str, number: int = 1) -> None:
        """Kill -9 a container's processes behind the engine's back, so that it starts it again."""
        os.kill(self.container(service, number).attrs["State"]["Pid"], signal.SIGKILL)

    def wait_until_restarted(self, service: str, number: int = 1) -> float:
        """Seconds until the engine has started a crashed container again."""
        started = time.monotonic()
        while self.container(service, number).attrs["RestartCount"] == 0:
            assert time.monotonic() - started < 60, self.states()
            time.sleep(0.2)
        return time.monotonic() - started

    def tail(self, service: str, number: int = 1) -> str:
        return "\n".join(self.logs(service, number).splitlines()[-30:])

    def status(self) -> tuple[int, str]:
        """What the status service answers: the HTTP status, and the state in words."""
        url = f"http://127.0.0.1:{self.variables['KT_STATUS_PORT']}/health"
        answer = httpx.get(url, trust_env=False, timeout=60)
        return answer.status_code, answer.json()["state"]

    def api(self, timeout: float = 120) -> httpx.Client:
        """A client of the served API, on the published port."""
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=timeout, trust_env=False
        )


@contextmanager
def watched(project: Project) -> Iterator[list[tuple[int, str]]]:
    """What the status service answers while the block runs, each answer once."""
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.05):
            with contextlib.suppress(httpx.TransportError):  # it is not there yet
                answer = project.status()
                if answer not in seen[-1:]:
                    seen.append(answer)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def kill_at_random(project: Project, service: str, within: float, source: random.Random) -> str:
    """Start a service, kill -9 its container; returns what the kill met."""
    with subprocess.Popen(
        ["docker", "compose", "--env-file", os.devnull, "-p", project.name]
        + [word for file in project.files for word in ("-f", file)]
        + ["up", "-d", "--no-build", "--no-deps", service],
        env={**os.environ, **project.environment()},
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as starting:
        delay = source.uniform(min(0.1, within / 2), within)
        container = _wait_until_started(project, service)
        time.sleep(delay)
        container.reload()
        running = container.attrs["State"]["Running"]
        if running:
            container.kill("SIGKILL")
        starting.wait(120)
    container.reload()
    code = container.attrs["State"]["ExitCode"]
    return f"after {delay:.2f} s: " + (f"killed ({code})" if running else f"already over ({code})")


def _wait_until_started(project: Project, service: str) -> Any:
    """The container of a service as soon as it runs anew."""
    deadline = time.monotonic() + 120
    before = _started_at(project, service)
    while time.monotonic() < deadline:
        if _started_at(project, service) != before:
            return project.container(service)
        time.sleep(0.02)
    raise AssertionError(f"{service} was not started: {project.states()}")


def _started_at(project: Project, service: str) -> str:
    try:
        return str(project.container(service).attrs["State"]["StartedAt"])
    except docker.errors.NotFound:
        return "0001-01-01T00:00:00Z"
