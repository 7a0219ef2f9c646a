"""The runner on a project of one file: what it says, and that it says nothing wrong."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.mutants.__main__ import main

SOUND = """\
import time

def largest(values):
    return max(values)

def waits(seconds):
    time.sleep(seconds)
"""
TESTS = """\
from thing import largest, waits

def test_largest():
    assert largest([1, 3, 2]) == 3

def test_waits():
    waits(0)
"""
FAULTS = {
    "found": ("max(values)", "min(values)"),
    "missed": ("max(values)", "sorted(values)[-1]"),
    "hangs": ("time.sleep(seconds)", "time.sleep(seconds + 600)"),
    "dies": ("time.sleep(seconds)", "__import__('os').abort()"),
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository, and beside it a table of faults."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a second of each start
    root = tmp_path / "project"
    root.mkdir()
    (root / "thing.py").write_text(SOUND)
    (root / "test_thing.py").write_text(TESTS)
    (root / "conftest.py").write_text("")  # so that pytest finds thing.py
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    write_table(root, **FAULTS)
    return root


def write_table(root: Path, **faults: tuple[str, str]) -> None:
    entries = []
    for name, (old, new) in faults.items():
        keys = {"id": name, "file": "thing.py", "old": old, "new": new, "harm": "much"}
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        tests = ['tests = ["test_thing.py"]']
        if name == "hangs":  # other tests may well take as long on a busy machine
            tests = ['tests = ["test_thing.py::test_waits"]', "limit = 1"]
        entries.append("\n".join(["[[fault]]", *lines, *tests]))
    root.with_name("faults.toml").write_text("\n".join(entries))


def run(root: Path, *more: str) -> int:
    return main(["--root", str(root), "--table", str(root.with_name("faults.toml")), *more])


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_verdicts(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(project)
    results = project.with_name("results.json")
    table = project.with_name("table.md")
    assert run(project, "--json", str(results), "--markdown", str(table)) == 1
    assert content(project) == before
    found = {
        entry["fault"]["id"]: entry["problem"] or entry["found_by"]
        for entry in json.loads(results.read_text())
    }
    assert found == {
        "found": "test_thing.py::test_largest",
        "missed": "NOT FOUND",
        "hangs": "test_thing.py::test_waits (hung: ended by the limit of 1 s)",
        "dies": "test_thing.py::test_waits (died of SIGABRT)",
    }
    assert "| missed | `thing.py` | much | NOT FOUND |" in table.read_text()
    assert "3 of 4 faults were found" in capsys.readouterr().out


def test_uncommitted_changes_are_tried_and_all_found_is_success(project: Path) -> None:
    write_table(project, found=("min(values)", "max(values)"))
    (project / "thing.py").write_text(SOUND.replace("max", "min"))
    (project / "test_thing.py").write_text(TESTS.replace("== 3", "== 1"))
    assert run(project) == 0


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("max(value)", "fault stale: its old text occurs 0 times in thing.py"),
        ("values", "fault stale: its old text occurs 2 times in thing.py"),
    ],
)
def test_a_stale_fault_is_an_error(
    project: Path, capsys: pytest.CaptureFixture[str], old: str, message: str
) -> None:
    write_table(project, stale=(old, "x"))
    assert run(project) == 2
    assert message in capsys.readouterr().err


def test_tests_that_fail_without_a_fault_end_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "thing.py").write_text(SOUND + "\nraise RuntimeError('broken')\n")
    assert run(project, "--only", "found") == 2
    error = capsys.readouterr().err
    assert "without any fault test_thing.py fails" in error
    assert "RuntimeError: broken" in error


def test_tests_that_are_skipped_find_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = TESTS.replace("def test", "@pytest.mark.skip\ndef test")
    (project / "test_thing.py").write_text("import pytest\n" + tests)
    assert run(project, "--only", "found") == 2
    assert "fault found: no test of test_thing.py ran here" in capsys.readouterr().err


def test_unknown_ids_are_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "--only", "found,other") == 2
    assert "there is no fault other: see --list" in capsys.readouterr().err
    assert run(project, "--list") == 0
    assert capsys.readouterr().out.splitlines()[0] == "found: thing.py: much"
