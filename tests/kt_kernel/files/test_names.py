"""Names out of files: only a visible file right in the folder is one."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.files.names import is_plain
from tests.mutations import EXAMPLES, fuzz

PLAIN = ("config.json", "model-00001-of-000163.safetensors", "a b", "é.json", "LICENSE", "x" * 255)
NOT_PLAIN = (
    "", ".", "..", ".kt-download.json", "../x", "/etc/passwd", "a/b", "a/../b", "a/", "./a", "a\\b",
    "a\0b", "a\nb", "a\x1b[31m", "x" * 256, "é" * 128, "\ud800",
)  # fmt: skip


def test_plain_names() -> None:
    assert [name for name in PLAIN if not is_plain(name)] == []
    assert [name for name in NOT_PLAIN if is_plain(name)] == []


@fuzz(5 * EXAMPLES)
@given(name=st.text(st.sampled_from("./\\a\0\n\ud800é~"), max_size=8))
def test_a_plain_name_can_be_written_and_stays_in_the_folder(name: str, tmp_path: Path) -> None:
    if is_plain(name):
        path = tmp_path / name
        path.write_bytes(b"")
        assert path.parent.resolve() == path.resolve().parent == tmp_path.resolve()
        assert [found.name for found in tmp_path.iterdir()] == [name]
        path.unlink()
