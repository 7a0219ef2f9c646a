"""How many layers fit where."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.rehearsal import plan
from benchmarks.rehearsal.plan import TMPFS, Machine, Model, choose, demand
from benchmarks.server import REPOSITORY
from deploy.settings.config import load
from kt_kernel.host.gpus import Gpu

DISK = Path("/disk")
GB = 1e9
VALUES = load({}, [REPOSITORY / "env" / "tutorial.env"], "serve").values


def card(gigabytes: float) -> Gpu:
    return Gpu("a card", int(gigabytes * GB), (9, 0), (13, 0), used_bytes=0)


CARD = card(140)


MODEL = Model("int4", 1, VALUES)
OWN_FILES = Model("int4", 1, VALUES, one_file=False)


def chosen(
    wanted: str, machine: Machine, model: Model = MODEL, check: int | None = None
) -> plan.Plan:
    return choose(wanted, machine, model, check)


def test_a_layer_takes_what_it_takes() -> None:
    one, two = (demand(n, OWN_FILES, CARD) for n in (1, 2))
    # A packed layer of 4.13 bits, and on the card attention, a shared and a resident expert.
    assert two.memory - one.memory == pytest.approx(5.82 * GB, rel=0.01)
    assert two.packed - one.packed == pytest.approx(5.82 * GB, rel=0.01)
    assert two.checkpoint - one.checkpoint == pytest.approx(0.31 * GB, rel=0.02)
    assert two.card - one.card == pytest.approx((0.32 + 0.046) * GB, rel=0.1)
    in_cpu_mode = demand(1, MODEL, None)
    assert in_cpu_mode.card == 0
    assert in_cpu_mode.memory > one.memory + 9 * GB  # embedding, head, dense layers in bf16


def test_files_in_memory_count_twice_and_the_disk_takes_over() -> None:
    disks = {TMPFS: 100 * GB, DISK: 500 * GB}
    for memory, packed, checkpoint in ((124, TMPFS, TMPFS), (110, TMPFS, DISK), (80, DISK, DISK)):
        found = chosen("8", Machine(memory * GB, disks, CARD), OWN_FILES)
        assert found == plan.Plan((1, 5, 8), checkpoint, packed), memory
    with pytest.raises(
        BenchmarkError, match=r"8 MoE layers do not fit: expected .* found 40\.0 GB"
    ):
        chosen("8", Machine(40 * GB, disks, CARD), OWN_FILES)


def test_with_one_packed_file_memory_is_what_limits() -> None:
    """All 58 layers on a disk of 40 GB; 17 in 120 GB of memory, where 17 files do not fit."""
    large = Machine(512 * GB, {DISK: 40 * GB}, CARD)
    assert chosen("1,8,58", large) == plan.Plan((1, 8, 58), DISK, DISK)
    with pytest.raises(BenchmarkError, match=r"58 MoE layers do not fit: expected .* of space in"):
        chosen("1,8,58", large, OWN_FILES)
    small = Machine(120 * GB, {TMPFS: 60 * GB, DISK: 64 * GB}, CARD)
    assert chosen("17", small) == plan.Plan((1, 9, 17), DISK, TMPFS)
    with pytest.raises(BenchmarkError, match=r"19 MoE layers do not fit: expected .* of memory"):
        chosen("19", small)


def test_the_check_is_a_server_more_that_has_to_fit_and_leaves_a_line() -> None:
    machine = Machine(120 * GB, {DISK: 64 * GB}, CARD)
    found = chosen("1,4,8", machine, check=16)
    assert (found.counts, found.check, found.most) == ((1, 4, 8), 16, 16)
    assert chosen("1,4,8", machine, check=8).counts == (1, 4)
    assert chosen("1,4,8", machine, check=2).most == 8
    with pytest.raises(BenchmarkError, match="58 MoE layers do not fit"):
        chosen("1,4", machine, check=58)
    with pytest.raises(BenchmarkError, match=r"--check 8: expected at least two other .* found 1 "):
        chosen("1,8", machine, check=8)
    for wrong in (0, 59):
        with pytest.raises(BenchmarkError, match="expected a number of MoE layers from 1 to 58"):
            chosen("1,4", machine, check=wrong)


@pytest.mark.parametrize(
    ("machine", "counts"),
    [
        (Machine(500 * GB, {DISK: 900 * GB}, CARD), (1, 7, 12)),
        (Machine(70 * GB, {DISK: 900 * GB}, CARD), (1, 6, 10)),
        (Machine(500 * GB, {DISK: 40 * GB}, CARD), (1, 3, 5)),
        (Machine(500 * GB, {DISK: 900 * GB}, card(12.4)), (1, 5, 8)),
        (Machine(18 * GB, {DISK: 900 * GB}, CARD), (1, 2)),
    ],
    ids=["enough", "memory", "disk", "card", "little memory"],
)
def test_auto_takes_what_memory_disk_and_card_hold(
    machine: Machine, counts: tuple[int, ...]
) -> None:
    found = chosen("auto", machine, OWN_FILES)
    assert found.counts == counts
    # One more would not have fitted, or is not wanted.
    if counts[-1] < plan.MOST:
        with pytest.raises(BenchmarkError, match="do not fit"):
            chosen(str(counts[-1] + 1), machine, OWN_FILES)


def test_nothing_fits_is_one_clear_error() -> None:
    with pytest.raises(
        BenchmarkError, match=r"1 MoE layers do not fit: expected 9\.\d GB of memory"
    ):
        chosen("auto", Machine(4 * GB, {DISK: 900 * GB}, CARD))
    with pytest.raises(BenchmarkError, match=r"no folder .* set --folder"):
        chosen("auto", Machine(400 * GB, {}, None))


def test_without_a_card_there_are_at_most_two() -> None:
    assert chosen("auto", Machine(500 * GB, {DISK: 900 * GB}, None)).counts == (1, 2)


@pytest.mark.parametrize("wanted", ["", "0", "59", "x", "1,,2", "2.5"])
def test_what_is_no_number_of_layers_is_refused(wanted: str) -> None:
    with pytest.raises(BenchmarkError, match="expected auto, a number of MoE layers from 1 to 58"):
        chosen(wanted, Machine(500 * GB, {DISK: 900 * GB}, CARD))


def test_given_numbers_are_taken_as_they_are() -> None:
    machine = Machine(500 * GB, {DISK: 900 * GB}, CARD)
    assert chosen("8,2,4", machine).counts == (2, 4, 8)
    assert chosen("1", machine).counts == (1,)
