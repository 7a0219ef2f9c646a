"""serve needs SGLang to find the plugin: without it experts on the GPU are scaled twice."""

from __future__ import annotations

import pytest

from deploy.settings.config import load
from deploy.stages import serve
from kt_kernel.errors import UserError
from kt_kernel.sglang_plugin import registration


def test_a_package_that_was_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "entry_points", lambda **_: ())
    monkeypatch.setattr(serve, "export", lambda _: None)  # it would change this process
    monkeypatch.setattr(serve, "become", lambda *_: pytest.fail("started all the same"))
    config = load({"KT_DEVICE": "cpu"}, [], "serve")
    with pytest.raises(UserError, match="SGLang would not load the kt_kernel plugin"):
        serve.run(config, print_only=False, as_json=False)


def test_printing_the_command_needs_no_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registration, "entry_points", lambda **_: ())
    monkeypatch.setattr(serve, "export", lambda _: None)  # it would change this process
    config = load({"KT_DEVICE": "cpu"}, [], "serve")
    assert serve.run(config, print_only=True, as_json=False) == 0
    assert "sglang.launch_server" in capsys.readouterr().out
