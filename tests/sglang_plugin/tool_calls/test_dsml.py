"""Tool calls come out as the template put them in, however the answer is cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.sglang_plugin.tool_calls.dsml import Call, Reader, from_json, read, to_json

MARK = "｜DSML｜"
END = f"</{MARK}parameter>"
SECTION, SECTION_END = f"<{MARK}function_calls>\n", f"\n</{MARK}function_calls>"

#: Text of a model, with the look of markup in it more often than chance would have it.
pieces = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *("<", "</", "｜", "DSML", '"', "{", "}", "\n", "\n\n", "  ", ">", "&lt;", "\\"),
            *(f"</{MARK}invoke>", f'<{MARK}invoke name="x">', f"</{MARK}function_calls>"),
            *(f'<{MARK}parameter name="x" string="true">', f"<{MARK}function_calls>", MARK),
        ]
    ),
)
texts = st.lists(pieces, max_size=6).map("".join)
values = texts.filter(lambda text: END not in text + END[:-1])
names = st.text("abc_-1.", min_size=1, max_size=8)
keys = st.text(st.characters(exclude_characters='"｜', codec="utf-8"), min_size=1, max_size=8)
others = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | values, max_size=3) | st.dictionaries(values, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: END not in to_json(value))
calls = st.builds(Call, names, st.dictionaries(keys, values | others, max_size=4))


def rendered(call: Call) -> str:
    """The call as V3.2's template writes it."""
    parameters = [
        f'<{MARK}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}{END}"
        for key, value in call.arguments.items()
    ]
    return "\n".join([f'<{MARK}invoke name="{call.name}">', *parameters, f"</{MARK}invoke>"])


def streamed(chunks: list[str]) -> tuple[str, list[Call]]:
    reader = Reader()
    results = [reader.feed(chunk) for chunk in chunks]
    prose = "".join(text for text, _ in results) + reader.held
    return prose, [call for _, calls in results for call in calls]


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(bounds)]


@given(
    prose=texts.filter(lambda text: f"<{MARK}" not in text + "<"),
    expected=st.lists(calls, min_size=1, max_size=3),
    ending=st.sampled_from(["", SECTION_END, SECTION_END + "\n", "\n", SECTION_END[:-3]]),
    section=st.sampled_from([SECTION, ""]),
    places=st.lists(st.integers(0, 10**6), max_size=12),
)
def test_what_the_template_wrote_is_read(
    prose: str, expected: list[Call], ending: str, section: str, places: list[int]
) -> None:
    """A trimmed value, a tag's look taken for the tag, a call lost with its section's end."""
    markup = section + "\n".join(map(rendered, expected)) + ending
    for gap in ("", "\n\n"):
        text = f"{prose}{gap}{markup}"
        told, found = read(text)
        assert found == expected
        assert told == (f"{prose}{gap}").removesuffix("\n\n")
        assert streamed(cut(text, places)) == (told, found)
        assert streamed(list(text)) == (told, found)


@given(text=texts, places=st.lists(st.integers(0, 10**6), max_size=12))
def test_any_text_reads_the_same_however_it_is_cut(text: str, places: list[int]) -> None:
    """Broken markup, too, and prose that only looks like markup."""
    for whole in (text, f'{SECTION}<{MARK}invoke name="f">{text}'):
        assert streamed(cut(whole, places)) == streamed(list(whole)) == read(whole)
    if f"<{MARK}" not in text:
        assert read(text) == (text, [])


@given(arguments=st.dictionaries(values, values | others, max_size=3), inner=st.booleans())
def test_a_json_body(arguments: dict[str, Any], inner: bool) -> None:
    if inner:
        arguments["end"] = f"the look of </{MARK}invoke>"
    text = f'<{MARK}invoke name="f">\n{json.dumps(arguments, ensure_ascii=False)}\n</{MARK}invoke>'
    text += rendered(Call("g", {}))
    assert read(text) == streamed(list(text)) == ("", [Call("f", arguments), Call("g", {})])


PARAMETER = f'<{MARK}parameter name="x" string="true">'


@pytest.mark.parametrize(
    "broken",
    [
        f'<{MARK}invoke name="f">\n',  # no end
        f'<{MARK}invoke name="f">\nprose\n</{MARK}invoke>',
        f'<{MARK}invoke name="f">\n<{MARK}parameter name="x">1{END}\n</{MARK}invoke>',
        f'<{MARK}invoke name="f">\n<{MARK}other>\n</{MARK}invoke>',
        f"<{MARK}invoke>\n</{MARK}invoke>",
        f'<{MARK}invoke name="f">\n{{"x": </{MARK}invoke>',
        f'<{MARK}invoke name="f">\n{{"x": NaN}}</{MARK}invoke>',
        f'<{MARK}invoke name="f">\n{{"x": 1e999}}</{MARK}invoke>',
        f'<{MARK}invoke name="f">\n{"[" * 20000}</{MARK}invoke>',
        f"{MARK}{END}",
    ],
)
def test_a_broken_call_is_left_out_and_the_next_one_read(broken: str) -> None:
    good = Call("g", {"y": " 1 "})
    text = f"before\n\n{SECTION}{broken}\n{rendered(good)}{SECTION_END}"
    assert read(text) == streamed(list(text)) == ("before", [good])


@pytest.mark.parametrize("unfinished", ["", "text", f"text{END[:-1]}"])
def test_a_value_without_an_end_is_no_argument(unfinished: str) -> None:
    """A model that stopped at its limit of tokens meant more than is there."""
    text = f'{SECTION}<{MARK}invoke name="f">\n{PARAMETER}{unfinished}'
    assert read(text) == streamed(list(text)) == ("", [])


def test_a_tag_that_ends_itself_has_no_arguments() -> None:
    assert read(f'<{MARK}invoke name="f"/>') == ("", [Call("f", {})])


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "[" * 100_000, "one", "", "1 2"])
def test_what_is_no_json_is_told_as_it_is_written(text: str) -> None:
    call = f'<{MARK}invoke name="f"><{MARK}parameter name="x" string="false">{text}{END}'
    assert read(f"{call}</{MARK}invoke>") == ("", [Call("f", {"x": text})])


def test_arguments_can_be_sent() -> None:
    """Half of a surrogate pair has no UTF-8: the response could not be written."""
    value = from_json('{"a": "\\ud800é", "b": "é\\n"}')
    assert json.loads(to_json(value).encode()) == value
    assert to_json({"b": "é"}) == '{"b": "é"}'
