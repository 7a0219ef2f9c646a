"""What is read about the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import machine


@pytest.mark.parametrize(
    ("text", "size"), [("32768K", 32 << 20), ("307200K", 300 << 20), ("1G", 1 << 30), ("?", 0)]
)
def test_size(text: str, size: int) -> None:
    assert machine.parse_size(text) == size


def test_second_hyperthreads_come_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(machine, "_SYS_CPU", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 2, 1, 0})
    assert machine.allowed_cpus() == [0, 1, 2, 3]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3})
    assert machine.allowed_cpus() == [0, 2, 3]
