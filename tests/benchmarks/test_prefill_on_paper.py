"""docs/performance.md has the table that the formula gives now."""

from __future__ import annotations

import pytest

from benchmarks import prefill_on_paper
from benchmarks.server import REPOSITORY


def test_the_table_is_that_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert prefill_on_paper.main() == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 6
    assert table in (REPOSITORY / "docs" / "performance.md").read_text()
