"""What a conversion tells the program that runs it."""

from __future__ import annotations

from pathlib import Path

from convert.cli import main
from tests.convert.helpers import convert_argv


def test_layers_are_told_as_they_are_finished(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    failures: list[str] = []

    def on_layers(finished: int, total: int) -> None:
        # What is told is on the disk: a reader may rely on it.
        assert len(list((tmp_path / "out").glob("layer-*.safetensors"))) == finished
        told.append((finished, total))

    argv = convert_argv(source, tmp_path / "out")
    assert main(argv, on_layers, failures.append) == 0
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    sorted((tmp_path / "out").glob("layer-*.safetensors"))[1].unlink()
    told.clear()
    assert main(argv, on_layers, failures.append) == 0
    assert told == [(2, 3), (3, 3)]
    assert failures == []


def test_the_reason_of_a_failure_is_told(tmp_path: Path) -> None:
    failures: list[str] = []
    argv = convert_argv(tmp_path / "no", tmp_path / "out")
    assert main(argv, on_failure=failures.append) == 2
    assert failures == [f"--input-path {tmp_path / 'no'} does not exist"]
    assert main(["--wrong"], on_failure=failures.append) == 2
    assert "--help lists the flags" in failures[1]
