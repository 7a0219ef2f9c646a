"""A finished output needs no writing, so it may lie where nothing can be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.helpers import directory_content

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]
ReadOnly = Callable[[Path, int], None]

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: Read-only, of another user, full, over the quota, without locks (NFS mounted with nolock).
ERRORS = [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK]


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> ReadOnly:
    """Make every change of a folder fail, as the kernel would."""

    def make(folder: Path, code: int) -> None:
        def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
                changes = name != "open" or bool(args and args[0] & WRITING)
                if changes and str(path).startswith(str(folder)):
                    raise OSError(code, os.strerror(code), str(path))
                return original(path, *args, **kwargs)

            return operation

        for name in ("open", "replace", "unlink", "utime", "mkdir", "rmdir"):
            monkeypatch.setattr(os, name, failing(name, getattr(os, name)))

    return make


@pytest.fixture
def output(converted: Path, tmp_path: Path) -> Path:
    """A copy of the finished conversion."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
def test_a_finished_output_that_cannot_be_written(
    source: Path, output: Path, tmp_path: Path, convert: Convert, read_only: ReadOnly, code: int
) -> None:
    (output / "layer-001.safetensors.tmp").write_text("left by a kill, and stays")
    (tmp_path / "reports").mkdir()
    before = directory_content(output)
    read_only(output, code)
    for more in (
        ["--verify"],
        ["--layers", "2"],
        ["--report", str(tmp_path / "reports" / "a.json")],
        [],
    ):
        lines = convert(source, output, *more)
    assert "3 of 3 layers finished before" in lines[1]
    assert directory_content(output) == before
    assert (tmp_path / "reports" / "a.json").exists()


@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
@pytest.mark.parametrize("missing", ["layer-002.safetensors", "manifest.json"])
def test_an_unfinished_output_that_cannot_be_written(
    source: Path,
    output: Path,
    convert_fails: ConvertFails,
    read_only: ReadOnly,
    code: int,
    missing: str,
) -> None:
    (output / missing).unlink()
    before = directory_content(output)
    read_only(output, code)
    line = convert_fails(source, output)
    is_full = code in (errno.ENOSPC, errno.EDQUOT)
    assert line.startswith(f"error: {'no space left while writing' if is_full else 'cannot write'}")
    assert str(output) in line
    assert directory_content(output) == before


def test_a_lock_that_another_user_left_is_named(
    source: Path,
    output: Path,
    convert_fails: ConvertFails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (output / "layer-002.safetensors").unlink()
    (output / ".convert.lock").touch()
    original = os.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".convert.lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    line = convert_fails(source, output)
    assert f"cannot write {output}/.convert.lock: Permission denied" in line


def test_a_source_that_cannot_be_written(
    source: Path, converted: Path, tmp_path: Path, convert: Convert, read_only: ReadOnly
) -> None:
    read_only(source, errno.EROFS)
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", "--verify")
    assert directory_content(tmp_path / "out") == directory_content(converted)


def test_a_lock_without_room_for_its_holders_name(
    source: Path, output: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full file system may still have an inode."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    convert(source, output)
    assert not (output / ".convert.lock").exists()


def test_a_report_that_cannot_be_written_is_refused_first(
    source: Path,
    tmp_path: Path,
    convert_fails: ConvertFails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    line = convert_fails(source, tmp_path / "out", "--report", str(tmp_path / "a.json"))
    assert f"cannot write to {tmp_path}" in line
    assert not (tmp_path / "out").exists()
