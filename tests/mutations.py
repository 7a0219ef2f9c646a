"""Damage to files, drawn by hypothesis: what a disk, another program or a stranger may leave."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: More of them look for what is not known yet: FUZZ_EXAMPLES=5000 pytest ...
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))


def fuzz(examples: int = EXAMPLES) -> Callable[[Any], Any]:
    """The settings of a test that damages files: the same damage in each run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=max(1, examples), deadline=None, derandomize=True, suppress_health_check=checks
    )


#: JSON texts that take a value's place.
VALUES = (
    "null", "true", "false", "0", "1", "-1", "2", "64", "1.5", "-0.0", "1e18", "1e999", "NaN",
    "-Infinity", str(2**31), str(2**63 - 1), str(2**63), str(-(2**63)), "1" * 400, "1" * 5000,
    '""', '"x"', '"../x"', r'"a\u0000b"', r'"\ud800"', r'"\n\u001b[31m"', f'"{"y" * 5000}"',
    "[]", "{}", "[[]]", '{"a": null}', "[0, 4]", "[4, 0]", "[-8, 8]", "[null]", '[1, "2"]',
    "[" + "1," * 999 + "1]", "[" * 80 + "]" * 80, "[" * 100_000, '{"a":' * 60 + "1" + "}" * 60,
)  # fmt: skip
_PLACE = "\ufdd0"  # stands for a text of VALUES until the whole is JSON


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file with one to three values replaced, dropped, doubled or moved."""
    value = json.loads(content)
    texts: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        value = _replaced(draw, value, texts)
    text = json.dumps(value)
    for number, replacement in enumerate(texts):
        text = text.replace(json.dumps(f"{_PLACE}{number}{_PLACE}"), replacement)
    return text.encode()


def _replaced(draw: st.DrawFn, value: Any, texts: list[str]) -> Any:
    """A copy with another value at some depth."""
    keys = list(value) if isinstance(value, dict) else range(len(value) if _is_list(value) else 0)
    if not keys or draw(st.integers(0, 9)) == 0:
        texts.append(draw(st.sampled_from(VALUES)))
        return f"{_PLACE}{len(texts) - 1}{_PLACE}"
    key = draw(st.sampled_from(keys))
    copy = value.copy()
    match draw(st.sampled_from(["deeper"] * 8 + ["drop", "rename", "exchange"])):
        case "drop":
            copy.pop(key)
        case "rename" if isinstance(copy, dict):
            copy[draw(st.sampled_from(["", "x", f"{key}.", "-1", "9" * 5000, "__metadata__"]))] = (
                copy.pop(key)
            )
        case "exchange":
            other = draw(st.sampled_from(keys))
            copy[key], copy[other] = copy[other], copy[key]
        case _:
            copy[key] = _replaced(draw, value[key], texts)
    return copy


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with flipped bytes, cut, lengthened or replaced."""
    match draw(st.sampled_from(["flip"] * 4 + ["cut", "insert", "append", "replace"])):
        case "cut":
            return content[: draw(st.integers(0, len(content)))]
        case "insert":
            place = draw(st.integers(0, len(content)))
            return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
        case "append":
            return content + draw(st.binary(min_size=1, max_size=9))
        case "replace":
            return draw(
                st.sampled_from([b"", b"\0", b"null", b"{}", b"[]", b'{"a', b"\xff\xfe{\0}\0"])
            )
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@st.composite
def damaged_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with damage in its header, whose length is right or not."""
    (length,) = struct.unpack("<Q", content[:8])
    head, data = content[8 : 8 + length], content[8 + length :]
    head = draw(st.one_of(damaged_json(head), damaged_json(head), damaged_bytes(head)))
    lengths = [len(head)] * 6 + [0, 7, len(head) - 1, len(head) + 1, 2**31, 2**63, 2**64 - 1]
    prefix = struct.pack("<Q", max(0, draw(st.sampled_from(lengths))))
    return (prefix + head + data)[: draw(st.sampled_from([None, None, None, 5, 8, 100]))]


def odd_files() -> dict[str, Callable[[Path], None]]:
    """What may be in a file's place; each takes the path, at which there is nothing."""

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 1 << 43)  # 8 TiB, as much as every file system takes

    def sparse_header(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", 1 << 42))
        os.truncate(path, 1 << 43)

    return {
        "directory": Path.mkdir,
        "pipe": os.mkfifo,
        "loop": lambda path: path.symlink_to(path.name),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "empty": Path.touch,
        "sparse": sparse,
        "sparse header": sparse_header,
    }


def put(path: Path, content: bytes) -> Path:
    """Write a file in the place of another, whatever kind that is."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path
