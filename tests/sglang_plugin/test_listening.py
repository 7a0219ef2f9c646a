"""A port that another program took while the model loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_kernel.host.addresses import bound, free_port
from kt_kernel.sglang_plugin.listening import refuse_taken_address


def test_a_taken_port_is_one_error_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """SGLang waited for ten minutes for its own warm-up to be answered by the other program."""
    arguments = SimpleNamespace(host="127.0.0.1", port=free_port())
    refuse_taken_address(arguments, "tokenizer manager", launch_callback=None)
    with bound("127.0.0.1", arguments.port) as other:
        other.listen()
        with pytest.raises(SystemExit) as stop:
            refuse_taken_address(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: KT_PORT: expected port {arguments.port} on 127.0.0.1 to be free still after "
        "loading, found another program listening there: stop it or set KT_PORT to another port\n"
    )
