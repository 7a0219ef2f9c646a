"""The compose files: all combinations are valid, and they know every setting."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deploy.settings.table import TABLE
from deploy.settings.variables import SECRETS
from tests.docker.engine import REPOSITORY, Engine, run

OVERRIDES = sorted(path.stem for path in (REPOSITORY / "compose").glob("*.yml"))
COMBINATIONS = [
    combination
    for length in range(len(OVERRIDES) + 1)
    for combination in itertools.combinations(OVERRIDES, length)
]
STAGES = ("download", "convert", "serve")


def configuration(engine: Engine, overrides: tuple[str, ...], **variables: str) -> dict[str, Any]:
    files = [f"compose/{name}.yml" for name in overrides]
    words = [word for file in ("docker-compose.yml", *files) for word in ("-f", file)]
    result = run(
        ["docker", "compose", "--env-file", os.devnull, *words, "config", "--format", "json"],
        {"SETTINGS_FILE": os.devnull, **engine.environment, **variables},
    )
    assert not result.stderr
    services: dict[str, Any] = json.loads(result.stdout)["services"]
    return services


@pytest.mark.parametrize("overrides", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_a_combination_is_valid(engine: Engine, overrides: tuple[str, ...]) -> None:
    services = configuration(engine, overrides)
    assert services.keys() >= set(STAGES)
    has_gpu = "devices" in str(services["serve"].get("deploy"))
    assert has_gpu == ("cpu" not in overrides)
    # What answers on the public port, and nothing else does.
    front = "router" if "replicas" in overrides else "serve"
    assert [name for name, service in services.items() if "30000" in str(service.get("ports"))] == [
        front
    ]
    # Whatever is built is built once, and taken from nowhere else.
    own = [service for service in services.values() if service["image"].endswith(":local")]
    assert {service["pull_policy"] for service in own} == {"never"}
    builds = Counter(service["image"] for service in own if "build" in service)
    assert builds == Counter({service["image"] for service in own})
    if "speciale" in overrides:
        for stage in STAGES:
            environment = services[stage]["environment"]
            assert environment["KT_MODEL_ID"] == "deepseek-ai/DeepSeek-V3.2-Speciale"
            assert environment["KT_TOOL_CALL_PARSER"] == "none"


def test_every_setting_reaches_the_stages_that_read_it(engine: Engine) -> None:
    """A value in the shell arrives, and without one the table's default holds."""
    handled = {"KT_HOST", "KT_PUBLISHED_HOST", "KT_RUN_DIR", "HF_HOME"}
    given = {
        setting.name: f"given-{setting.name}"
        for setting in TABLE
        if setting.name not in handled | {"KT_PORT", "KT_STATUS_PORT"}
    }
    services = configuration(engine, (), **given, KT_PORT="12345", KT_STATUS_PORT="12346")
    for setting in TABLE:
        for stage in set(setting.stages) & {*STAGES, "status"}:
            environment = services[stage]["environment"]
            if setting.name in given:
                assert environment.get(setting.name) == given[setting.name], (stage, setting.name)
            else:
                assert environment.get(setting.name), (stage, setting.name)


def test_secrets_reach_the_stages_that_read_them_as_files(engine: Engine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    files = dict.fromkeys(("HF_TOKEN_FILE", "KT_API_KEY_FILE", "KT_ADMIN_KEY_FILE"), str(secret))
    services = configuration(engine, (), **files)
    for stage, name, target in (
        ("download", "HF_TOKEN_FILE", "hf_token"),
        ("serve", "KT_API_KEY_FILE", "api_key"),
        ("serve", "KT_ADMIN_KEY_FILE", "admin_key"),
    ):
        assert services[stage]["environment"][name] == f"/run/secrets/{target}"
        assert target in [entry["source"] for entry in services[stage]["secrets"]]
    assert not services["convert"].get("secrets")


def test_a_secret_in_the_settings_file_reaches_who_needs_it_only(
    engine: Engine, tmp_path: Path
) -> None:
    """The file goes into every stage as a whole; where a secret is of no use it is taken out."""
    readers = {
        "HF_TOKEN": {"download"},
        "HUGGING_FACE_HUB_TOKEN": {"download"},
        "KT_API_KEY": {"preflight", "serve", "client", "router"},
        "KT_ADMIN_KEY": {"preflight", "serve", "router"},
        "HF_ENDPOINT": {"preflight", "download"},
        "HTTPS_PROXY": {"download"},
        "https_proxy": {"download"},
        "FTP_PROXY": {"download"},
    }
    settings = tmp_path / "settings"
    settings.write_text("".join(f"{name}=http://me:secret-{name}@host\n" for name in readers))
    words = ["docker", "compose", "--env-file", str(settings), "--profile", "client"]
    files = ("docker-compose.yml", *(f"compose/{name}.yml" for name in ("cpu", "replicas")))
    words += [word for file in files for word in ("-f", file)]
    result = run(
        [*words, "config", "--format", "json"],
        {**engine.environment, "SETTINGS_FILE": str(settings)},
    )
    services = json.loads(result.stdout)["services"]
    for name, expected in readers.items():
        having = {key for key, service in services.items() if f"secret-{name}" in str(service)}
        assert having == expected


def test_the_settings_of_compose_are_documented() -> None:
    files = [REPOSITORY / "docker-compose.yml", *(REPOSITORY / "compose").glob("*.yml")]
    used = {name for file in files for name in re.findall(r"(?<!\$)\$\{(\w+)", file.read_text())}
    documented = set(re.findall(r"`(\w+)`", (REPOSITORY / "docs/operations.md").read_text()))
    assert used - {setting.name for setting in TABLE} - SECRETS.keys() <= documented
