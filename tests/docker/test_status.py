"""Stages that go on without whoever started them, and what the status service says of them."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.docker.project import Project, watched


def test_up_returns_and_the_stages_take_their_turns(project: Callable[..., Project]) -> None:
    # New volumes are for any user.
    slow = project("tests/docker/slow-hub.yml", RUN_AS="12345:12346")
    with watched(slow) as told:
        slow.up("download", "convert")
        # Nobody is there to start the conversion after the download: it waits by itself.
        slow.wait_until_told(r"downloading \d+\.\d of \d+\.\d MB")
        assert slow.states()["convert"] == "running"
        slow.container("download").kill("SIGKILL")
        ended = "the process ended without a word while downloading .*"
        slow.wait_until_told(f"restarting: {ended}")
        slow.wait_until_told(f"failed: {ended}")
        slow.up("download")
        slow.wait_until_told(r"convert finished")
    assert {status for status, _ in told} == {503}
    assert any(re.fullmatch(r"converting \d+ of \d+ layers", state) for _, state in told), told
    assert "waiting for download, which ended without a word" in slow.logs("convert")
    assert slow.container("convert").wait()["StatusCode"] == 0
    states = slow.states()
    assert states["download"] == states["convert"] == states["preflight"] == "exited (0)"
    # It is not one of those that a stage's end ends.
    assert states["status"] == "running"
