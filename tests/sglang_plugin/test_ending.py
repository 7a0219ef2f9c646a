"""How a server ends, without one: what its processes do on signals, and what is left of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kt_kernel.load_progress import PROGRESS_VARIABLE
from kt_kernel.server_phase import told_phase
from kt_kernel.sglang_plugin import ending


def test_only_a_warm_up_that_succeeded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "serve-layers.json"))
    name = "sglang.srt.entrypoints.http_server"
    server = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, server)
    for status, told in (("Starting", None), ("Up", "ready")):
        manager = SimpleNamespace(server_status=SimpleNamespace(name=status))
        monkeypatch.setattr(
            server, "_global_state", SimpleNamespace(tokenizer_manager=manager), raising=False
        )
        ending.tell_ready(None)
        assert told_phase(tmp_path) == told
    ending.tell_ending(object())
    assert told_phase(tmp_path) == "ending"
