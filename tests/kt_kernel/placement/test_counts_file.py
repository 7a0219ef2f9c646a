"""The file of counts adds up, whoever writes it, and whenever that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kt_kernel.errors import UserError
from kt_kernel.files.foreign import FileMissing
from kt_kernel.placement.counts import Model
from kt_kernel.placement.counts_file import add_counts, read_counts
from kt_kernel.placement.saving import CountsSaver
from tests.locks import refuse_locks

MODEL = Model("f" * 64, 4)
COUNTS = {3: np.array([1, 0, 2, 0]), 4: np.array([0, 0, 0, 7])}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "experts.json"


def test_counts_add_up(path: Path) -> None:
    with pytest.raises(FileMissing):
        read_counts(path, MODEL)
    for _ in range(2):
        add_counts(path, MODEL, COUNTS)
    add_counts(path, MODEL, {5: np.array([0, 1, 0, 0])})
    found = read_counts(path, MODEL)
    assert {layer: of.tolist() for layer, of in found.items()} == {
        3: [2, 0, 4, 0],
        4: [0, 0, 0, 14],
        5: [0, 1, 0, 0],
    }


DAMAGE: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "another file of ours": lambda text: json.dumps({"format": "kt-kernel-packed"}),
    "a version to come": lambda text: text.replace('"format_version": 1', '"format_version": 2'),
    "another checkpoint": lambda text: text.replace("f" * 64, "e" * 64),
    "another shape": lambda text: text.replace('"num_experts": 4', '"num_experts": 5'),
    "a count too few": lambda text: text.replace("[1, 0, 2, 0]", "[1, 0, 2]"),
    "a negative count": lambda text: text.replace("[1, 0, 2, 0]", "[1, 0, 2, -1]"),
    "no integer": lambda text: text.replace("[1, 0, 2, 0]", "[1, 0, 2, 0.5]"),
    "a huge count": lambda text: text.replace("[1, 0, 2, 0]", f"[1, 0, 2, {2**63 - 1}]"),
    "no layer": lambda text: text.replace('"3"', '"-3"'),
    "a long layer": lambda text: text.replace('"3"', f'"{"3" * 5000}"'),
    "no layers": lambda text: text.replace('"layers"', '"layer"'),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_what_is_no_file_of_these_counts_is_refused_in_one_line_and_kept(
    path: Path, damage: str
) -> None:
    add_counts(path, MODEL, COUNTS)
    before = path.read_text()
    path.write_text(DAMAGE[damage](before))
    assert path.read_text() != before
    uses: list[Callable[[], object]] = [
        lambda: read_counts(path, MODEL),
        lambda: add_counts(path, MODEL, COUNTS),
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert path.read_text() == DAMAGE[damage](before)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*experts\.json"):
        add_counts(tmp_path / "file" / "experts.json", MODEL, COUNTS)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from kt_kernel.placement.counts import Model
from kt_kernel.placement.counts_file import add_counts
for i in range(int(sys.argv[2])):
    add_counts(Path(sys.argv[1]), Model("f" * 64, 4), {3: np.array([1, 1, 1, 1])})
    print(i, flush=True)
"""


def writer(path: Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_writers_do_not_undo_each_other(path: Path) -> None:
    writers = [writer(path, 40) for _ in range(2)]
    assert [one.wait(60) for one in writers] == [0, 0]
    for one in writers:
        one.communicate()
    assert read_counts(path, MODEL)[3].tolist() == [80] * 4


def test_without_locks_counts_are_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch)
    add_counts(path, MODEL, {3: np.array([1, 0, 0, 2])})
    assert read_counts(path, MODEL)[3].tolist() == [1, 0, 0, 2]


def test_a_kill_leaves_the_old_file_or_the_new(path: Path) -> None:
    """Whenever it comes: no count that was said to be saved is lost, and none is half there."""
    said = 0
    for kill in range(4):
        one = writer(path, 10**6)
        assert one.stdout is not None
        for _ in range(5 + kill):
            one.stdout.readline()
        time.sleep(0.0007 * kill)
        os.kill(one.pid, signal.SIGKILL)
        said += 5 + kill + len(one.communicate()[0].splitlines())
        found = read_counts(path, MODEL)[3].tolist()
        assert len(set(found)) == 1
        assert said <= found[0] <= said + kill + 1
    assert sorted(p.name for p in path.parent.iterdir() if ".tmp" not in p.name) == [
        ".experts.json.lock",
        "experts.json",
    ]


def test_a_saver_adds_what_is_new(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = np.array([9, 9, 9, 9])
    saver = CountsSaver(path, MODEL, {3: lambda: now.copy()})
    saver.save()
    assert not path.exists(), "what was counted before it began is not its own"
    now[2] += 3
    saver.save()
    add_counts(path, MODEL, {3: np.array([1, 0, 0, 0])})
    now[0] += 1
    saver.save()
    saver.save()
    assert read_counts(path, MODEL)[3].tolist() == [2, 0, 3, 0]
    path.write_text("{")
    now[1] += 1
    with pytest.raises(UserError):
        saver.save()
    path.unlink()
    saver.save()
    assert read_counts(path, MODEL)[3].tolist() == [0, 1, 0, 0]
