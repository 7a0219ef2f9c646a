"""Lists of indices for people."""

from __future__ import annotations

from kt_kernel.files.units import ranges


def test_ranges_are_written_as_the_kernel_does() -> None:
    assert ranges([3, 0, 1, 2, 8, 10]) == "0-3,8,10"
    assert ranges([3, 4, 6], ", ") == "3-4, 6"
    assert ranges([]) == ""
