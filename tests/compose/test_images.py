"""Images of others are pinned by digest, each in one version."""

from __future__ import annotations

import re

from tests.compose.files import REPOSITORY

PINNED = re.compile(r"docker\.io/[\w/-]+:[\w.-]+@sha256:[0-9a-f]{64}")


def test_images_of_others_are_pinned_by_digest_and_the_same_everywhere() -> None:
    files = [REPOSITORY / "Dockerfile", REPOSITORY / "docker-compose.yml"]
    files += sorted((REPOSITORY / "compose").glob("*.yml"))
    named = {
        (image, file.name)
        for file in files
        for image in re.findall(r"docker\.io/[^\s}]+", file.read_text())
    }
    assert not {image for image, _ in named if not PINNED.fullmatch(image)}
    versions: dict[str, set[str]] = {}
    for image, _ in named:
        versions.setdefault(image.partition(":")[0], set()).add(image)
    assert set(versions) == {
        "docker.io/grafana/grafana",
        "docker.io/nvidia/cuda",
        "docker.io/prom/prometheus",
    }
    assert [name for name, found in versions.items() if len(found) > 1] == []
