"""The wheel on trial in the image."""

from __future__ import annotations

import re
import time

from tests.docker.engine import Engine
from tests.docker.images import build_test_image


def test_the_wheel_passes_the_kernels_tests_in_the_image(
    engine: Engine, images: dict[str, str], measured: list[str]
) -> None:
    started = time.monotonic()
    printed = build_test_image(engine)
    took = time.monotonic() - started
    # Not there if an engine that was kept has built it before.
    summary = re.findall(r"\d+ passed.* in [\d.]+s.*", printed) or ["cached"]
    measured.append(f"make image-test: {took:.0f} s; kernel tests in the image: {summary[0]}")
    assert engine.docker("image", "inspect", "tests/test:local").returncode == 0
