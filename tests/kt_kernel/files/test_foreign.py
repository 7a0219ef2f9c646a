"""Readers of files that may hold anything: a value of the right type, or one line of error."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from kt_kernel import packed
from kt_kernel.errors import UserError, describe, one_line
from kt_kernel.files import foreign
from kt_kernel.files.foreign import Fields, FileMissing, read_fields, read_file, read_stream
from kt_kernel.files.safetensors_header import LARGEST_HEADER, read_header
from kt_kernel.load_progress import load_progress
from tests.kt_kernel.layer_files import LAYOUTS, write_layer
from tests.mutations import (
    EXAMPLES,
    damaged_bytes,
    damaged_header,
    damaged_json,
    fuzz,
    odd_files,
    put,
)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound layer file."""
    return write_layer(tmp_path_factory.mktemp("layer"), LAYOUTS["int8"], 5).read_bytes()


@fuzz(5 * EXAMPLES)
@given(data=st.data())
def test_a_header_is_read_as_the_public_library_reads_it(
    data: st.DataObject, layer: bytes, tmp_path: Path
) -> None:
    """Whatever safetensors opens is read alike, and hardly anything else."""
    path = put(tmp_path / "a.safetensors", data.draw(damaged_header(layer)))
    try:
        header = read_header(path)
    except UserError:
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass
        return
    assert header.data_end <= header.file_size == path.stat().st_size
    refused = ""
    try:
        with safe_open(path, "np") as file:
            names = set(file.keys())
            assert {name: tuple(file.get_slice(name).get_shape()) for name in names} == {
                name: entry.shape for name, entry in header.tensors.items()
            }
            assert (file.metadata() or {}) == header.metadata
    except SafetensorError as error:
        refused = str(error)
    # Bytes behind the data, a dtype of a tensor that nobody reads: other checks' concern.
    assert not refused or re.search("not fully covered|unknown variant|floating point `-0", refused)
    with contextlib.suppress(UserError):
        packed.check_layer_header(header, LAYOUTS["int8"], 5)


def test_null_metadata_is_none(tmp_path: Path) -> None:
    tensor = b'"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    for head in (b'{"__metadata__":null,%s}' % tensor, b"{%s}" % tensor):
        path = put(tmp_path / "a", len(head).to_bytes(8, "little") + head + bytes(4))
        assert read_header(path).metadata == {}


@pytest.mark.parametrize("kind", odd_files())
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """No wait for a pipe's writer, and no terabytes of memory for a hole."""
    path = tmp_path / "odd"
    odd_files()[kind](path)
    with pytest.raises(UserError, match=str(path)):
        read_header(path)
    with pytest.raises(UserError, match=str(path)):
        read_fields(path)
    load_progress.cache_clear()
    path.rename(tmp_path / packed.MANIFEST_NAME)
    assert load_progress(tmp_path).total == 0


def test_a_header_beyond_the_formats_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes((LARGEST_HEADER + 1).to_bytes(8, "little"))
    os.truncate(path, 2 * LARGEST_HEADER)

    def parsed(_: bytes) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("kt_kernel.files.safetensors_header.parse_json", parsed)
    with pytest.raises(UserError, match="has 100000001 bytes, expected at most 100000000"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\\ud800"}', "not Unicode"),
        (b"[" * 200_000, "more than 64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels"),
        (b'{"a": %s}' % (b"1" * 5000), "is not valid JSON"),
        (b"[1, 2]", "holds a list of 2, expected a JSON object"),
        (b"null", "holds null, expected"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_fields(put(tmp_path / "a.json", content))


def test_json_that_other_readers_take(tmp_path: Path) -> None:
    for content in (b'{"a": "\\ud83d\\ude00"}', b'{"a": NaN}', b'{"a":' * 64 + b"1" + b"}" * 64):
        assert read_fields(put(tmp_path / "a.json", content)).has("a")


FIELDS = {
    "count": 3,
    "huge": 2**63,
    "yes": True,
    "half": 0.5,
    "infinite": float("inf"),
    "word": "x" * 100,
    "list": [1, 2],
    "object": {"a": "b", "c": None},
    "null": None,
}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda f: f.integer("yes"), "f: yes is true, expected an integer >= 0"),
        (lambda f: f.integer("huge"), "f: huge is 9223372036854775808, expected an integer"),
        (lambda f: f.integer("count", 4, 9), "f: count is 3, expected an integer 4 to 9"),
        (lambda f: f.integer("null"), "f has no null: expected an integer >= 0"),
        (lambda f: f.number("infinite"), "f: infinite is Infinity, expected a finite number"),
        (lambda f: f.number("yes"), "f: yes is true, expected a finite number"),
        (lambda f: f.flag("count"), "f: count is 3, expected true or false"),
        (lambda f: f.text("list"), "f: list is a list of 2, expected a text"),
        (lambda f: f.array("word"), "f: word is 'x{49}..., expected a list"),
        (lambda f: f.integers("list", 1), "f: list is a list of 2, expected a list of integers"),
        (lambda f: f.texts("object"), r"f has no object\.c: expected a text"),
        (lambda f: f.inner("count"), "f: count is 3, expected an object"),
        (lambda f: f.inner("object").integer("a"), r"f: object\.a is 'b', expected an integer"),
    ],
)
def test_a_field_of_another_type(ask: object, message: str) -> None:
    assert callable(ask)
    with pytest.raises(UserError, match=f"^{message}"):
        ask(Fields(FIELDS, "f"))


def test_null_is_the_same_as_no_field() -> None:
    for name in ("null", "absent"):
        fields = Fields(FIELDS, "f")
        assert not fields.has(name)
        assert fields.integer(name, default=7) == 7
        assert fields.number(name, 0.5) == 0.5
        assert fields.text(name, "") == ""
        assert fields.flag(name, False) is False
        assert fields.integers(name, default=[1]) == [1]
        assert fields.texts(name, {}) == {}
        assert fields.inner(name, optional=True).values == {}


def test_a_message_is_one_line_whatever_the_names_in_it() -> None:
    assert str(UserError("a\nb\x1b[31m\udcff é")) == "a\\nb\\x1b[31m\\udcff é"
    assert len(str(UserError("x" * 1_000_000))) < 2100
    assert one_line("plain") == "plain"
    assert describe(OSError(2, "No such file", "a\nb")) == "a\\nb: No such file"


def test_a_file_is_read_to_its_limit(tmp_path: Path) -> None:
    path = put(tmp_path / "a", b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(UserError, match="larger than a file of its kind: expected at most 4 bytes"):
        read_file(path, 4)
    with pytest.raises(FileMissing):
        read_file(path / "below")


def test_a_stream_may_be_a_pipe_but_not_a_silent_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "PIPE_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="to which nothing is written"):
        read_stream(pipe)
    with pytest.raises(OSError, match="too large"):
        read_stream(Path("/dev/zero"), 1000)
    monkeypatch.setattr(foreign, "PIPE_SECONDS", 60)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * 200_000,))
    writer.start()
    assert read_stream(pipe) == b"x" * 200_000
    writer.join()


@fuzz()
@given(data=st.data())
def test_any_bytes_are_json_or_a_user_error(data: st.DataObject, tmp_path: Path) -> None:
    text = b'{"model": {"moe_layers": [1, 2]}, "list": [{"a": 1.5, "b": "c"}], "x": null}'
    path = put(tmp_path / "a", data.draw(st.one_of(damaged_bytes(text), damaged_json(text))))
    with contextlib.suppress(UserError):
        read_fields(path)
