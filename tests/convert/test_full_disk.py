"""A disk that is full before or during the conversion."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.helpers import REPOSITORY, convert_argv, directory_content

Convert = Callable[..., list[str]]
ConvertFails = Callable[..., str]


def test_too_little_space_is_found_before_anything_is_written(
    source: Path, tmp_path: Path, convert_fails: ConvertFails, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = convert_fails(source, tmp_path / "out")
    assert "not enough free space" in line
    assert "found 50.0 kB" in line
    assert str(tmp_path / "out") in line
    assert not (tmp_path / "out").exists()


def test_space_for_the_rest_is_enough_when_resuming(
    source: Path, converted: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(converted, tmp_path / "out"))
    (output / "layer-003.safetensors").unlink()
    one_layer = (output / "layer-001.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=one_layer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    convert(source, output)
    assert directory_content(output) == directory_content(converted)


@pytest.mark.parametrize("operation", ["posix_fallocate", "pwrite", "fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failing_operation(
    source: Path,
    converted: Path,
    tmp_path: Path,
    convert: Convert,
    convert_fails: ConvertFails,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    code: int,
) -> None:
    """The disk fails while the second layer is written; a later run goes on from there."""
    output = tmp_path / "out"
    original = getattr(os, operation)

    def failing(*args: Any, **kwargs: Any) -> Any:
        opening = operation == "open" and "layer-002" in str(args[0])
        if opening or (output / "layer-002.safetensors.tmp").exists():
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, operation, failing)
    line = convert_fails(source, output)
    monkeypatch.undo()
    assert str(output / "layer-002.safetensors") in line
    expected = os.strerror(code) if code == errno.EIO else "no space left"
    assert expected in line
    names = sorted(file.name for file in output.iterdir())
    assert names == ["layer-001.safetensors", "manifest.json"]
    convert(source, output)
    assert directory_content(output) == directory_content(converted)


def test_manifest_cannot_be_written(
    source: Path,
    converted: Path,
    tmp_path: Path,
    convert: Convert,
    convert_fails: ConvertFails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer is finished but not recorded; the next run takes it over as it is."""
    output = tmp_path / "out"
    original = os.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if "manifest.json.tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    line = convert_fails(source, output)
    monkeypatch.undo()
    assert "no space left" in line
    assert str(output / "manifest.json") in line
    assert [file.name for file in output.iterdir()] == ["layer-001.safetensors"]
    inode = (output / "layer-001.safetensors").stat().st_ino
    convert(source, output)
    assert (output / "layer-001.safetensors").stat().st_ino == inode
    assert directory_content(output) == directory_content(converted)


def test_file_size_limit(source: Path, tmp_path: Path) -> None:
    """A real limit of the kernel, met while a layer file is allocated."""
    output = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-m", "convert", *convert_argv(source, output)],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert result.returncode == 2
    assert "layer-001.safetensors: File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()


def mount_namespace() -> list[str] | None:
    """A command prefix that may mount a tmpfs of its own; None where the host forbids it."""
    for prefix in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        probe = [*prefix, "mount", "-t", "tmpfs", "none", "/mnt"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return prefix
    return None


@pytest.mark.parametrize("spare_pages", [0, 1])
def test_really_full_file_system(
    source: Path, converted: Path, tmp_path: Path, spare_pages: int
) -> None:
    """A tmpfs too small by a page, the lock file's, or with room for that but for no rounding up.

    The first is found beforehand; in the second case allocating the last layer fails.
    """
    prefix = mount_namespace()
    if prefix is None:
        pytest.skip("this host lets nobody mount a tmpfs (needs CAP_SYS_ADMIN or user namespaces)")
    page = os.sysconf("SC_PAGE_SIZE")
    needed = sum(file.stat().st_size for file in converted.glob("layer-*"))
    size = (-(-needed // page) + spare_pages) * page
    target = tmp_path / "disk"
    target.mkdir()
    script = (
        f'mount -t tmpfs -o size={size} none {target} && "$@"; code=$?; ls -A {target}; exit $code'
    )
    argv = [sys.executable, "-m", "convert", *convert_argv(source, target)]
    result = subprocess.run(
        [*prefix, "sh", "-c", script, "sh", *argv], cwd=REPOSITORY, text=True, capture_output=True
    )
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1
    left = [line for line in result.stdout.splitlines() if line.endswith((".safetensors", "json"))]
    if spare_pages == 0:
        assert "not enough free space" in result.stderr
        assert left == []
    else:
        assert "no space left while writing" in result.stderr
        assert left == ["layer-001.safetensors", "layer-002.safetensors", "manifest.json"]
    assert ".tmp" not in result.stdout
