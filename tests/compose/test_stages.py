"""In which order the stages run."""

from __future__ import annotations

import itertools

from tests.compose.files import services


def test_each_stage_waits_for_the_success_of_the_one_before() -> None:
    stages = services()
    for earlier, later in itertools.pairwise(("gpu", "download", "convert", "serve")):
        assert stages[later]["depends_on"][earlier] == {
            "condition": "service_completed_successfully"
        }


def test_proxies_and_keys_are_for_the_stages_that_read_them() -> None:
    names = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
    found = services()
    for name in ("gpu", "convert", "serve", "status", "client"):
        assert not {key for key in found[name]["environment"] if key.upper() in names}
        assert found[name]["environment"]["HF_TOKEN"] == ""
    assert {key for key in found["download"]["environment"] if key.upper() in names} == {
        *names,
        *map(str.lower, names),
    }
    for name in ("gpu", "download", "convert", "status"):
        assert found[name]["environment"]["KT_API_KEY"] == ""
