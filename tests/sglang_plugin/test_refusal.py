"""Refusing to serve: one line, status 2, and not an Exception SGLang would swallow."""

import pytest

from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin.refusal import refusing_to_serve


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("the disk is full"), "error: the disk is full\n"),
        (KeyError("gone"), "error: could not start in SGLang "),
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


def test_success_passes() -> None:
    with refusing_to_serve("could not start"):
        pass
