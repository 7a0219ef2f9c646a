"""The table fits the tree: a fault whose text is gone would no longer say anything."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.faults import Fault, read_table

ROOT = Path(__file__).parents[2]
FAULTS = read_table()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_the_fault_fits_the_tree(fault: Fault) -> None:
    assert fault.problem(ROOT) == ""


def test_all_parts_have_faults() -> None:
    parts = Counter(fault.file.partition("/")[0] for fault in FAULTS)
    assert len(FAULTS) >= 40
    assert parts.keys() >= {"csrc", "kt_kernel", "convert", "deploy", "docker"}
