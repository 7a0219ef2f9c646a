"""What is read about the machine."""

from __future__ import annotations

import pytest

from benchmarks import host_description


@pytest.mark.parametrize(
    ("text", "size"), [("32768K", 32 << 20), ("307200K", 300 << 20), ("1G", 1 << 30), ("?", 0)]
)
def test_size(text: str, size: int) -> None:
    assert host_description.parse_size(text) == size
