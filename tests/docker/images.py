"""The images of these tests, built by the compose files.

``DOCKER_TESTS_KEEP=FOLDER python -m tests.docker.images`` builds them ahead of the tests, into the
engine data that the tests will use.
"""

from __future__ import annotations

import os
import signal
import ssl
import sys
import time
from urllib.parse import urlsplit

from tests.docker.engine import (
    KEEP,
    Engine,
    EngineUnavailable,
    debian_uris,
    make_base_image,
    run,
    run_of_tests,
    shared_engine,
)
from tests.docker.project import Project

BASE_IMAGE = "local/debian:bookworm"
NAMES = {
    "IMAGE": "tests/runtime:local",
    "DEMO_IMAGE": "tests/demo:local",
    "ROUTER_IMAGE": "tests/router:local",
}
"""The variables by which the compose files name their images."""


def build_variables(engine: Engine) -> dict[str, str]:
    """What a build needs on this machine's network: mirror, index and certificates."""
    bundle = ssl.get_default_verify_paths().cafile or ""
    lines = ["[global]"] + (["cert = /run/secrets/ca_bundle"] if bundle else [])
    index = run(["python3", "-m", "pip", "config", "get", "global.index-url"], check=False)
    if index.returncode == 0:
        lines.append(f"index-url = {index.stdout.strip()}")
    pip_conf = engine.root / "pip.conf"
    pip_conf.write_text("\n".join(lines) + "\n")
    mirror = urlsplit(debian_uris()[0])
    return {
        "BASE_IMAGE": BASE_IMAGE,
        "APT_MIRROR": f"{mirror.scheme}://{mirror.netloc}",
        "PIP_CONF_FILE": str(pip_conf),
        **({"CA_BUNDLE_FILE": bundle} if bundle else {}),
    }


def build(engine: Engine) -> list[str]:
    """Build all images of NAMES; returns lines that say how long it took."""
    started = time.monotonic()
    make_base_image(engine, BASE_IMAGE)
    told = [f"base image: {time.monotonic() - started:.0f} s"]
    started = time.monotonic()
    project = Project(engine, "build", {**NAMES, **build_variables(engine)})
    project.make("image", "WITH=cpu replicas", timeout=1700)
    told.append(f"make image: {time.monotonic() - started:.0f} s")
    return told


def build_test_image(engine: Engine) -> str:
    """``make image-test``: the kernels' tests on the wheel; returns what the build printed."""
    own = {"TEST_IMAGE": "tests/test:local", "BUILDKIT_PROGRESS": "plain"}
    project = Project(engine, "build", {**build_variables(engine), **own})
    result = project.make("image-test", timeout=900)
    return result.stdout + result.stderr


def main() -> int:
    if not os.environ.get(KEEP):
        print(f"error: {KEEP} is not set: expected the folder for the engine's data")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with run_of_tests():
        try:
            print("\n".join(build(shared_engine())))
        except EngineUnavailable as error:
            print(f"no images: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
