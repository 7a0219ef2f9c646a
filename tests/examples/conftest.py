"""The tiny checkpoint in both dtypes, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tiny.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "fp8"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    make_checkpoint(folder, dtype="bf16")
    return folder
