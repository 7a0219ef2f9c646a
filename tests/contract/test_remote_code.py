"""V3.2 needs no Python code of the checkpoint's own: SGLang itself knows how to read its config.

Of the published wheels; that the installed one reads config and tokenizer without such code is
tested in tests/examples/test_tiny_sglang.py, which loads them.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator

import pytest

from tests.contract.published_wheels import PLUGIN_WHEELS, PublishedWheel

REGISTRY = "_CONFIG_REGISTRY"
FOLDER = "sglang/srt/utils/hf_transformers"


def registered(source: str) -> Iterator[str]:
    """The model types for which a module puts a class of its own into SGLang's registry."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(
                targets=[ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key)))]
            ) if name == REGISTRY:
                yield key


@pytest.mark.parametrize("wheel", PLUGIN_WHEELS, ids=str)
def test_sglang_brings_the_config_of_v32(wheel: PublishedWheel) -> None:
    """Else --trust-remote-code would be needed, which is off by default."""
    with zipfile.ZipFile(wheel.fetch()) as archive:
        modules = [n for n in archive.namelist() if n.startswith(FOLDER) and n.endswith(".py")]
        found = {key for name in modules for key in registered(archive.read(name).decode())}
    assert "deepseek_v32" in found
