"""The wheel on trial in the image."""

from __future__ import annotations

import re
import time

from tests.docker.engine import Engine
from tests.docker.project import Project


def test_the_wheel_passes_the_kernels_tests_in_the_image(
    engine: Engine,
    images: dict[str, str],
    build_variables: dict[str, str],
    measured: list[str],
) -> None:
    own = {"TEST_IMAGE": "tests/test:local", "BUILDKIT_PROGRESS": "plain"}
    started = time.monotonic()
    result = Project(engine, "build", {**build_variables, **own}).make("image-test", timeout=900)
    took = time.monotonic() - started
    # Not there if an engine that was kept has built it before.
    summary = re.findall(r"\d+ passed.* in [\d.]+s.*", result.stdout + result.stderr) or ["cached"]
    measured.append(f"make image-test: {took:.0f} s; kernel tests in the image: {summary[0]}")
    assert engine.docker("image", "inspect", "tests/test:local").returncode == 0
