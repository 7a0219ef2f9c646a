"""The engine, the images and the projects of these tests."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docker.engine import (
    Engine,
    EngineUnavailable,
    debian_uris,
    make_base_image,
    run,
    running_engine,
)
from tests.docker.project import CPU, Project, watched

BASE_IMAGE = "local/debian:bookworm"
IMAGES = {
    "IMAGE": "tests/runtime:local",
    "DEMO_IMAGE": "tests/demo:local",
    "ROUTER_IMAGE": "tests/router:local",
}
#: Machines for tests may lack CAP_SYS_RESOURCE, which raising a limit needs.
SMALL = {"MEMLOCK": "65536", "HEALTH_INTERVAL": "3s", "SHM_SIZE": "512m"}
MEASURED: list[str] = []
"""Lines for the terminal summary."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("docker")
            item.add_marker(pytest.mark.timeout(1800))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("containers")
        for line in MEASURED:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def measured() -> list[str]:
    return MEASURED


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine; without one, the tests are skipped and say why."""
    try:
        with running_engine() as engine:
            yield engine
    except EngineUnavailable as error:
        pytest.skip(f"no Docker engine: {error}")


@pytest.fixture(scope="session")
def small() -> dict[str, str]:
    return SMALL


@pytest.fixture(scope="session")
def build_variables(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a build needs on this machine's network: mirror, index and certificates."""
    folder = tmp_path_factory.mktemp("build")
    bundle = ssl.get_default_verify_paths().cafile or ""
    lines = ["[global]"] + (["cert = /run/secrets/ca_bundle"] if bundle else [])
    index = run(["python3", "-m", "pip", "config", "get", "global.index-url"], check=False)
    if index.returncode == 0:
        lines.append(f"index-url = {index.stdout.strip()}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    mirror = urlsplit(debian_uris()[0])
    return {
        "BASE_IMAGE": BASE_IMAGE,
        "APT_MIRROR": f"{mirror.scheme}://{mirror.netloc}",
        "PIP_CONF_FILE": str(folder / "pip.conf"),
        **({"CA_BUNDLE_FILE": bundle} if bundle else {}),
    }


@pytest.fixture(scope="session")
def images(engine: Engine, build_variables: dict[str, str], measured: list[str]) -> dict[str, str]:
    """The images that the compose files name, built through them."""
    started = time.monotonic()
    make_base_image(engine, BASE_IMAGE)
    measured.append(f"base image: {time.monotonic() - started:.0f} s")
    started = time.monotonic()
    files = (*CPU, "compose/replicas.yml")
    builder = Project(engine, "build", {**IMAGES, **build_variables}, files)
    for service in ("hub", "serve", "router"):  # one after the other: they share layers
        builder.compose("build", service, timeout=1700)
    measured.append(f"docker compose build: {time.monotonic() - started:.0f} s")
    return IMAGES


@pytest.fixture
def project(
    engine: Engine, images: dict[str, str], request: pytest.FixtureRequest
) -> Iterator[Callable[..., Project]]:
    """project(VARIABLE=value, ...) makes a project that is removed with its volumes."""
    made: list[Project] = []

    def make(*files: str, **variables: str) -> Project:
        name = f"t{abs(hash(request.node.nodeid)) % 10**8}n{len(made)}"
        made.append(Project(engine, name, {**images, **SMALL, **variables}, (*CPU, *files)))
        return made[-1]

    yield make
    for each in made:
        each.down(volumes=True)


@pytest.fixture(scope="session")
def stack(
    engine: Engine, images: dict[str, str], small: dict[str, str], measured: list[str]
) -> Iterator[Project]:
    """The whole pipeline, up and healthy; ``told`` is what its status service said meanwhile."""
    project = Project(engine, "stack", {**images, **small})
    try:
        started = time.monotonic()
        with watched(project) as project.told:
            project.up()
            project.wait_until_healthy()
        measured.append(f"cold up, until healthy: {time.monotonic() - started:.0f} s")
        yield project
    finally:
        project.down(volumes=True)
