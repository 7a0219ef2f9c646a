"""``docker compose`` gives the lines of an env file the values that ``--env-file`` gives them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from deploy.errors import UserErrors
from deploy.settings.env_file import read_env_file
from tests.deploy.compose_values import ENVIRONMENT, VALUES, texts
from tests.docker.engine import Engine, run


def test_compose_gives_the_same_values(engine: Engine, tmp_path: Path) -> None:
    """What compose refuses is refused; what is refused for other reasons is not compared."""
    ours: dict[str, dict[str, str]] = {}
    recorded = [text for text, _ in VALUES]
    for number, text in enumerate([*recorded, *texts(2000, seed=1)]):
        file = tmp_path / f"{number}.env"
        file.write_bytes(text.encode())
        try:
            found = read_env_file(file, ENVIRONMENT)
        except UserErrors:
            continue
        ours[f"s{number}"] = {line.name: line.value for line in found}
    assert len(ours) > 1000
    services = {name: {"image": "x", "env_file": [f"{name[1:]}.env"]} for name in ours}
    (tmp_path / "compose.yml").write_text(json.dumps({"services": services}))
    words = ["docker", "compose", "--project-directory", str(tmp_path), "--env-file", os.devnull]
    words += ["-f", str(tmp_path / "compose.yml"), "config", "--format", "json"]
    answer = json.loads(run(words, {**engine.environment, **ENVIRONMENT}).stdout)["services"]
    theirs = {
        # The output is a compose file again, in which $$ is a dollar sign.
        name: {k: v.replace("$$", "$") for k, v in (answer[name].get("environment") or {}).items()}
        for name in ours
    }
    assert theirs == ours
