"""Servers of one host compute on CPUs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kt_kernel.errors import UserError
from kt_kernel.host.cpus import Cpu, allowed_cpus
from kt_kernel.host.reservations import Reservations, holders
from tests.locks import refuse_locks

FOUR = [Cpu(id, 0, 0) for id in range(4)]
TWO_NODES = [Cpu(id, id // 4, 0) for id in range(8)]


def test_each_takes_what_the_others_left(tmp_path: Path) -> None:
    first, second, third = (Reservations(tmp_path / "new" / "no") for _ in range(3))
    (tmp_path / "new").mkdir()
    assert first.choose(FOUR, 1, 1) == ([[0]], [])
    assert second.choose(FOUR, 2, 1) == ([[1, 2]], [])
    assert first.choose(FOUR, 2, 1) == ([[0, 3]], [])  # its own is no other's
    # There are no more: the smallest evil, and said.
    assert third.choose(FOUR, 2, 1) == ([[0, 1]], [0, 1])


def test_one_that_ends_leaves_its_cpus(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from kt_kernel.host.reservations import *\n"
        "cpus = [Cpu(id, 0, 0) for id in range(4)]\n"
        "print(Reservations(Path(sys.argv[1])).choose(cpus, 3, 1), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "([[0, 1, 2]], [])\n"
        assert holders(tmp_path) == dict.fromkeys(range(3), other.pid)
        assert Reservations(tmp_path).choose(FOUR, 1, 1) == ([[3]], [])
    finally:
        other.kill()
        other.communicate()
    assert Reservations(tmp_path).choose(FOUR, 3, 1) == ([[0, 1, 2]], [])


def test_the_node_that_is_free_comes_first(tmp_path: Path) -> None:
    first, second = Reservations(tmp_path), Reservations(tmp_path)
    assert first.choose(TWO_NODES, 4, 1) == ([[0, 1, 2, 3]], [])
    assert second.choose(TWO_NODES, 4, 1) == ([[4, 5, 6, 7]], [])


def test_what_was_tried_in_vain_is_given_back(tmp_path: Path) -> None:
    """A pool for each node: the free CPU of the first node does not stay locked for nothing."""
    first, second, third = (Reservations(tmp_path) for _ in range(3))
    first.choose([TWO_NODES[0]], 1, 1)
    # It locks 1 before it learns that 0 is taken.
    assert second.choose([TWO_NODES[1], TWO_NODES[0], TWO_NODES[4]], 1, 1)[1] == []
    assert third.choose(TWO_NODES, 5, 2)[1] == []


def test_a_directory_that_cannot_be_used_reserves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "no" / "such", Path("/proc/self")):
        for _ in range(2):
            assert Reservations(directory).choose(FOUR, 2, 1) == ([[0, 1]], [])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cpu0").symlink_to(tmp_path / "made")
    Reservations(tmp_path / "links").choose(FOUR, 1, 1)
    assert not (tmp_path / "made").exists()


def test_another_users_files_are_locked_too(tmp_path: Path) -> None:
    for cpu in range(4):
        (tmp_path / f"cpu{cpu}").touch(0o444)
    tmp_path.chmod(0o555)
    first, second = Reservations(tmp_path), Reservations(tmp_path)
    assert first.choose(FOUR, 1, 1) == ([[0]], [])
    assert second.choose(FOUR, 1, 1) == ([[1]], [])
    tmp_path.chmod(0o755)


def test_the_directory_is_for_all_users(tmp_path: Path) -> None:
    Reservations(tmp_path / "locks").choose(FOUR, 1, 1)
    assert (tmp_path / "locks").stat().st_mode & 0o7777 == 0o1777


def test_kt_cpus_is_what_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("KT_CPUS", f"{usable[-1]},9999")
    assert [cpu.id for cpu in allowed_cpus()] == [usable[-1]]
    for text in ("9999", "x", "3-1-2"):
        monkeypatch.setenv("KT_CPUS", text)
        with pytest.raises(UserError, match=f"KT_CPUS: expected CPUs .* found {text}"):
            allowed_cpus()


def test_without_locks_none_is_another_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server computes all the same, and keeps no file open for nothing."""
    refuse_locks(monkeypatch)
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(2):
        assert Reservations(tmp_path).choose(FOUR, 2, 1) == ([[0, 1]], [])
    assert len([*Path("/proc/self/fd").iterdir()]) == before
