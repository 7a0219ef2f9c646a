"""The engine, the images and the projects of these tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import ONE_STACK
from tests.docker import images as image_builds
from tests.docker.engine import Engine, EngineUnavailable, shared_engine
from tests.docker.project import CPU, Project, watched

#: Machines for tests may lack CAP_SYS_RESOURCE, which raising a limit needs.
SMALL = {"MEMLOCK": "65536", "HEALTH_INTERVAL": "3s", "SHM_SIZE": "512m"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("docker")
            item.add_marker(pytest.mark.timeout(1800))
            if "stack" in getattr(item, "fixturenames", ()) and item.location[0] not in ONE_STACK:
                raise pytest.UsageError(f"{item.nodeid} uses the stack: add its file to ONE_STACK")


@pytest.fixture(scope="session")
def engine() -> Engine:
    """A running engine; without one, the tests are skipped and say why."""
    try:
        return shared_engine()
    except EngineUnavailable as error:
        pytest.skip(f"no Docker engine: {error}")


@pytest.fixture(scope="session")
def small() -> dict[str, str]:
    return SMALL


@pytest.fixture(scope="session")
def build_variables(engine: Engine) -> dict[str, str]:
    return image_builds.build_variables(engine)


@pytest.fixture(scope="session")
def images(engine: Engine, measured: list[str]) -> dict[str, str]:
    """The images that the compose files name, built through them."""
    with FileLock(engine.root / "images.lock"):  # the second process finds them built
        measured += image_builds.build(engine)
    return image_builds.NAMES


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
