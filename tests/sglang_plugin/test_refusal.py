"""Refusing to serve: one line, status 2, and not an Exception SGLang would swallow."""

import pytest

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin import register
from kt_kernel.sglang_plugin.refusal import refusing_to_serve
from tests.deploy.helpers import without_home


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("the disk is full"), "error: the disk is full\n"),
        (KeyError("gone"), "error: could not start in SGLang "),
        (PermissionError(13, "Permission denied", "/x"), "error: could not start: PermissionError"),
        (MemoryError(), "error: could not start: MemoryError"),
        (ImportError("libcuda.so.1: cannot open shared object file"), "error: could not start: Im"),
    ],
)
def test_one_line_and_status_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, refusing_to_serve("could not start"):
        raise error
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1
    assert ("tested with" in printed) == isinstance(error, KeyError)


def test_success_passes() -> None:
    with refusing_to_serve("could not start"):
        pass


def test_no_home_directory_is_told_before_sglang_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its libraries end without one, and the plugin took that for another version of SGLang."""
    without_home(monkeypatch)
    with pytest.raises(SystemExit):
        register()
    printed = capsys.readouterr().err
    assert printed.startswith("error: no home directory: HOME is not set and user ")
    assert "tested with" not in printed
