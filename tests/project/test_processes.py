"""How tests are shared out among processes."""

from __future__ import annotations

import pytest

from tests.conftest import cpus_of_process, scope_of


@pytest.mark.parametrize(("cpus", "count"), [(2, 2), (3, 2), (4, 3), (16, 8), (64, 8)])
def test_processes_use_all_cpus_and_share_none_without_need(cpus: int, count: int) -> None:
    """Threads of two engines that are pinned to one CPU wait for each other's time slices."""
    shares = [cpus_of_process(range(cpus), index, count) for index in range(count)]
    assert all(len(set(share)) == len(share) >= 2 for share in shares)
    used = [cpu for share in shares for cpu in share]
    if cpus >= 2 * count:
        assert len(set(used)) == len(used)
    assert len(set(used)) >= min(cpus, 2 * count) - 1


def test_a_lone_cpu_is_all_there_is() -> None:
    assert set(cpus_of_process([3], 0, 1)) == {3}


def test_what_shares_the_stack_runs_in_one_process() -> None:
    nodes = [f"tests/docker/test_{name}.py::test" for name in ("serving", "monitoring", "kill")]
    assert [scope_of(node) for node in nodes] == ["stack", "stack", "tests/docker/test_kill.py"]
    servers = [f"tests/serve/test_greedy_tokens.py::test[{index}]" for index in range(2)]
    assert scope_of(servers[0]) != scope_of(servers[1])
