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
