"""Fixtures of the conversion's tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.command import main
from tests.convert.fake_checkpoint import fake_checkpoint
from tests.convert.helpers import REPOSITORY, convert_argv


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound FP8 checkpoint: layer 0 dense, 1 to 3 with experts, 4 MTP. Never changed."""
    return fake_checkpoint().write(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` as INT4, made by an uninterrupted run. Never changed."""
    output = tmp_path_factory.mktemp("converted") / "int4"
    assert main(convert_argv(source, output)) == 0
    return output


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run a conversion in this process that must succeed; returns its lines of progress."""

    def run(source: Path, output: Path, *more: str) -> list[str]:
        capsys.readouterr()
        code = main(convert_argv(source, output, *more))
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
        return captured.out.splitlines()

    return run


@pytest.fixture
def convert_fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a conversion that must end with exit code 2 and one line on stderr; returns the line."""

    def run(source: Path, output: Path, *more: str) -> str:
        capsys.readouterr()
        code = main(convert_argv(source, output, *more))
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert captured.err.endswith("\n")
        return captured.err

    return run


@pytest.fixture
def start_convert() -> Callable[..., subprocess.Popen[str]]:
    """Start the real command in a process of its own."""

    def start(*argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "convert", *argv],
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start
