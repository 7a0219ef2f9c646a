"""Old and misspelt names of compose's own variables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.checks.compose import check_compose_variables
from deploy.checks.result import Result
from deploy.settings.compose_names import COMPOSE, RENAMED
from deploy.settings.variables import is_known, known_names
from tests.deploy.checks.situations import situation
from tests.deploy.helpers import REPOSITORY

#: Of the image, of the engine and of other programs.
OTHERS = """
PATH HOME HOSTNAME TERM LANG PWD USER SHLVL VIRTUAL_ENV PYTHONPATH LD_LIBRARY_PATH CUDA_VERSION
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NV_CUDA_CUDART_VERSION
NCCL_VERSION XDG_CACHE_HOME TRITON_CACHE_DIR FLASHINFER_WORKSPACE_BASE SSL_CERT_FILE container
KUBERNETES_PORT COMPOSE_PROFILES COMPOSE_FILE NO_PROXY no_proxy
"""


def results(**variables: str) -> list[Result]:
    here = situation(Path("/"), KT_PUBLISHED_HOST="127.0.0.1")
    others = dict.fromkeys([*known_names(), *OTHERS.split()], "1")
    here = replace(here, environment={**others, **variables})
    return list(check_compose_variables(here))


def test_what_compose_knows_and_what_others_have_is_right() -> None:
    (found,) = results(**dict.fromkeys(COMPOSE, "1"), GPU_COUNT="")
    assert (found.status, found.todo) == ("PASS", "")


def test_an_old_name_is_an_error() -> None:
    """`GPU_COUNT=2` of an older .env was ignored, and the server had one card."""
    (found,) = results(GPU_COUNT="2")
    assert (found.status, found.sentence()) == (
        "FAIL",
        "compose-variables: expected GPU_IDS, which replaced GPU_COUNT, found GPU_COUNT, which is "
        "ignored: set GPU_IDS in its place (docs/operations.md has its values)",
    )


@pytest.mark.parametrize(
    ("name", "near"), [("GPU_ID", "GPU_IDS"), ("REPLICA", "REPLICAS"), ("SHMSIZE", "SHM_SIZE")]
)
def test_a_misspelt_name_is_a_warning(name: str, near: str) -> None:
    (found,) = results(**{name: "2"})
    assert (found.status, found.found) == ("WARN", f"{name}, which is ignored")
    assert found.todo == f"did you mean {near}?"


def test_a_name_of_another_meaning_is_no_misspelt_one() -> None:
    """For IMAGE_TAG, of somebody's own, a warning suggested IMAGE_TARGET, a stage of the build."""
    (found,) = results(IMAGE_TAG="1.0")
    assert (found.status, found.todo) == ("PASS", "")


def test_outside_of_compose_such_names_are_anybodys() -> None:
    here = situation(Path("/"))
    here = replace(here, environment={"GPU_COUNT": "2", "MODEL": "x"})
    assert list(check_compose_variables(here)) == []


def test_the_list_is_that_of_the_files_and_of_the_document() -> None:
    files = [REPOSITORY / "docker-compose.yml", *(REPOSITORY / "compose").glob("*.yml")]
    read = {name for file in files for name in re.findall(r"\$\{([A-Z_]+)", file.read_text())}
    assert {name for name in read if not is_known(name)} == set(COMPOSE)
    rows = re.findall(r"^\| (`[A-Z].*?) \|", (REPOSITORY / "docs/operations.md").read_text(), re.M)
    told = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    assert set(COMPOSE) <= told
    assert set(RENAMED.values()) <= set(COMPOSE)
    assert not set(RENAMED) & set(COMPOSE)
