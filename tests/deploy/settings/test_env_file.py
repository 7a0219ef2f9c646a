"""Env files give the values that ``docker compose`` gives, or one clear error for each line."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import UserErrors
from deploy.settings.config import load
from deploy.settings.env_file import read_env_file
from tests.deploy.compose_values import ENVIRONMENT, VALUES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.env"


@pytest.mark.parametrize(("text", "values"), VALUES, ids=[repr(text) for text, _ in VALUES])
def test_what_compose_gave(file: Path, text: str, values: dict[str, str]) -> None:
    file.write_bytes(text.encode())
    assert {line.name: line.value for line in read_env_file(file, ENVIRONMENT)} == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=${SET", "1: A has ${ without the } that belongs to it; write $$ for a dollar sign"),
        ("A=${SET^^}", "1: A has ${...} in a form that compose does not know: expected"),
        ("A=${}", "1: A has ${...} in a form"),
        ("A=${UNSET:?say it}", "1: A needs the variable UNSET, which is not set: say it"),
        ("A=" + "${UNSET:-" * 3000 + "}" * 3000, "1: A has more than 16 variables inside each"),
        ("A='x' B=2", "1: A has text behind the closing '"),
        ('A="x"y\nB=', '1: A has text behind the closing "'),
        ("B=1\n\nA='x\nC=2\n", "3: A has an opening ' but no closing one at the end"),
        ("A\nB=1", "1: expected NAME=value, found another line (not shown"),
        ("A B=1", "1: expected NAME=value, found another line (not shown"),
        ("A-B=1", "1: expected NAME=value, found another line (not shown"),
        (
            "A=" + "x" * 1000 + "\nB=" + "$A" * 1000 + "\nC=" + "$B" * 1000,
            "3: C and earlier lines use variables of 2000000 characters, expected at most 1000000",
        ),
        ("A=x\0y", "1: A has a NUL character, which no variable can hold"),
        ("A='x\ny'\nB=1\nB=2", "4: B is set again, first at FILE:3"),
    ],
)
def test_what_is_refused(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(UserErrors) as caught:
        read_env_file(file, ENVIRONMENT)
    expected = f"{file}:{message.replace('FILE', str(file))}"
    assert [line[: len(expected)] for line in caught.value.messages] == [expected]


def test_a_variable_that_is_not_set_is_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A password with a dollar sign would be cut short without a word."""
    file.write_text("A=pa$word1\nKT_API_KEY=pa$word1\n")
    read_env_file(file)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: {file}:1: A uses $word1, which is not set: taken as empty")
    assert second.startswith(f"warning: {file}:2: KT_API_KEY uses a variable, which is not set")


def test_later_files_may_use_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("OMP_X=/m\nKT_PORT=1\n")
    (tmp_path / "b").write_text("KT_MODEL_PATH=$OMP_X/$KT_PORT$HERE\n")
    config = load({"HERE": "x", "KT_PORT": "2"}, [tmp_path / "a", tmp_path / "b"])
    assert config["KT_MODEL_PATH"] == Path("/m/2x")
