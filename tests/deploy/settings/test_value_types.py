"""Types of setting values and the parsing of the settings' texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert.source.formats import FORMATS
from deploy.settings.value_types import (
    PORT,
    REPOSITORY,
    TOKEN,
    URL,
    AlwaysTrue,
    Boolean,
    Choice,
    CpuList,
    FilePath,
    Integer,
    JsonObject,
    Number,
    ShellWords,
    ValueType,
)
from deploy.settings.variables import BY_NAME
from kt_kernel import _ext


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Integer(1), "60", 60),
        (Integer(), "-3", -3),
        (PORT, "65535", 65535),
        (Number(above=0, maximum=1), "0.98", 0.98),
        (Number(), "1e3", 1000.0),
        (Boolean(), "YES", True),
        (AlwaysTrue(), "on", True),
        (Boolean(), "on", True),
        (Boolean(), "1", True),
        (Boolean(), "True", True),
        (Boolean(), "no", False),
        (Boolean(), "Off", False),
        (Boolean(), "0", False),
        (Boolean(), "false", False),
        (Choice(("a", "b")), "b", "b"),
        (FilePath(), "/models/a b", Path("/models/a b")),
        (FilePath(), "~/models", Path.home() / "models"),
        (JsonObject(), '{"index_topk": null}', {"index_topk": None}),
        (CpuList(), "0-3,8", "0-3,8"),
        (ShellWords(), "--a 'b c' --d=e", ["--a", "b c", "--d=e"]),
        (URL, "http://localhost:1234", "http://localhost:1234"),
        (REPOSITORY, "deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V3.2"),
    ],
)
def test_good(kind: ValueType, text: str, value: Any) -> None:
    parsed = kind.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Integer(1), "0"),
        (Integer(), "1.5"),
        (Integer(), "1_000"),
        (Integer(), "sixty"),
        (PORT, "65536"),
        (Number(above=0, maximum=1), "0"),
        (Number(above=0, maximum=1), "1.01"),
        (Number(), "nan"),
        (Number(), "inf"),
        (Number(), "1e999"),
        (Boolean(), "2"),
        (Boolean(), "enabled"),
        (AlwaysTrue(), "0"),  # it was taken, and changed nothing
        (Choice(("AMXINT4",)), "amxint4"),
        (CpuList(), "0-99999999999"),
        (CpuList(), "3-0"),
        (CpuList(), "0-3,"),
        (FilePath(), "a\0b"),
        (JsonObject(), "[1]"),
        (JsonObject(), "{"),
        (ShellWords(), "--a 'b"),
        (URL, "localhost:1234"),
        (URL, "ftp://host"),
        (REPOSITORY, "DeepSeek-V3.2"),
        (REPOSITORY, "a/b/c"),
        (TOKEN, "a b"),
        (TOKEN, "schl\xfcssel"),
    ],
)
def test_bad(kind: ValueType, text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        kind.parse(text)


def test_auto_and_none_only_where_allowed() -> None:
    assert BY_NAME["KT_CPUINFER"].parse("AUTO") == "auto"
    assert BY_NAME["KT_MAX_TOTAL_TOKENS"].parse("none") is None
    with pytest.raises(ValueError, match="auto"):
        BY_NAME["KT_PORT"].parse("auto")
    with pytest.raises(ValueError, match="none"):
        BY_NAME["KT_CHUNKED_PREFILL_SIZE"].parse("none")


@pytest.mark.parametrize("setting", BY_NAME.values(), ids=list(BY_NAME))
def test_every_default_and_tutorial_value_is_valid(setting: Any) -> None:
    for text in (setting.default, setting.tutorial):
        if text:
            setting.parse(text)
    assert setting.help.endswith((".", ")"))
    assert setting.stages
    assert bool(setting.adds) == bool(setting.reason) == bool(setting.turn_off)


def test_choices_are_what_is_there_to_choose() -> None:
    known = {
        "KT_TARGET": {name for name, _ in _ext.targets()},
        "KT_INPUT_TYPE": {*FORMATS, "auto"},
    }
    for name, words in known.items():
        kind = BY_NAME[name].type
        assert isinstance(kind, Choice)
        assert set(kind.words) == words, name
