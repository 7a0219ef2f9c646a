"""The status service beside a download that takes its time, is killed and started again."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

from tests.docker.project import Project, watched


def test_tells_what_the_stages_do_and_that_one_was_killed(project: Callable[..., Project]) -> None:
    slow = project("tests/docker/slow-hub.yml")
    with watched(slow) as told:
        starting = threading.Thread(target=slow.up, args=["download"])
        starting.start()
        wait_for(told, r"downloading \d+\.\d of \d+\.\d MB")
        starting.join()
        slow.container("download").kill("SIGKILL")
        wait_for(told, r"failed: the process ended without a word while downloading .*")
        slow.up("download")
        wait_for(told, r"download finished")
        slow.up("convert")
        wait_for(told, r"convert finished")
    assert {status for status, _ in told} == {503}
    assert any(re.fullmatch(r"converting \d+ of \d+ layers", state) for _, state in told), told
    # It is not one of those that a stage's end ends.
    assert slow.states()["status"] == "running"


def wait_for(told: list[tuple[int, str]], pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not (told and re.fullmatch(pattern, told[-1][1])):
        assert time.monotonic() < deadline, (pattern, told[-5:])
        time.sleep(0.02)
