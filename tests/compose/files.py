"""The compose files as YAML, for what can be said of them without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]


class _Loader(yaml.SafeLoader):
    """Knows the tag by which an override takes something away."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def services(name: str = "docker-compose.yml") -> dict[str, dict[str, Any]]:
    """The services of one file, its own anchors resolved."""
    # The loader is PyYAML's safe one.
    found: dict[str, dict[str, Any]] = yaml.load((REPOSITORY / name).read_text(), _Loader)[
        "services"
    ]
    return found
