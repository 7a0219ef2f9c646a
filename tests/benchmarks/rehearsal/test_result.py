"""The sentences for the owner of a machine."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.rehearsal import result

#: 5 ms and 2 ms for each layer; the bound is 58 * 8 experts of 22.7 MB at 100 GB/s: 105 ms.
SERVERS: list[dict[str, Any]] = [
    {
        "layers": n,
        "start_seconds": 40.0,
        "memory_bytes": 5.82e9 * n + 6e9,
        "card_bytes": 12 * 2**30,
        "prefill": {"4096": [0.3 + 0.25 * n] * 2},
        "decode": {
            "1": {
                "seconds": [0.005 + 0.002 * n] * 3,
                "experts": 8.0,
                "uniform": 7.97,
                "prepare": 5e-6,
                "workers": 1.9e-3,
            }
        },
        "step": {
            "total": 0.022,
            "windows": n * 1.95e-3,
            "overlapped": 0.0,
            "kernels": 0.0005 + n * 1e-4,
            "copies": n * 1e-5,
            "idle": 1e-4,
            "timeline": {"kernels": [(0.0, 1e-4)], "copies": [], "CPU experts": [(1e-4, 2e-3)]},
        },
    }
    for n in (1, 4, 8)
]


@pytest.fixture
def found() -> dict[str, Any]:
    result_: dict[str, Any] = {
        "machine": {"cpu": "CPU X", "cpus": 16, "memory_bytes": 137_000_000_000},
        "card": "GPU Y",
        "method": "int4",
        "resident": 1,
        "servers": copy.deepcopy(SERVERS),
        "reads GB/s": {
            "before": {"best": 100.0},
            "after 8": {"best": 96.0},
            "after 1": {"best": 80.0},
        },
        "card_memory": {
            "free": 140 * 2**30,
            "computed": {"total": 28 * 2**30},
            "computed_here": {"total": 11 * 2**30},
        },
    }
    return result.derive(result_)


def test_the_owner_reads_speed_share_of_the_bound_and_memory(found: dict[str, Any]) -> None:
    text = "\n".join(result.answer(found))
    assert "CPU X, 16 CPUs, GPU Y; int4 experts, 1 of each layer on the GPU:" in text
    # 1 / 0.121 s; the bound of 1 / 0.1055 s.
    assert "answer at 8.3 tokens/s (8.3 to 8.3, 0.0% off), 87% of the 9.5 that reading" in text
    assert "servers: 100, 96, 80 GB/s. The machine changed meanwhile; against the lowest" in text
    assert "the shares are 1.25 times as large" in text
    assert (
        "15 s (14.8 to 14.8, 0.0% off) to the first token of a prompt of 4096, 277 tokens/s" in text
    )
    assert "Memory: 342 GB, 336 of them experts; the machine has 137: not enough" in text
    assert "28.0 GiB computed for the whole model of 140.0" in text
    assert "11.0 computed, 12.0 seen" in text


@pytest.mark.parametrize("times", [[0.5, 0.5], [0.2, 0.9]], ids=["falling", "scattered"])
def test_a_line_that_may_be_at_nothing_is_no_figure(
    found: dict[str, Any], times: list[float]
) -> None:
    """Two servers of a shared machine once gave -29 ms for a prompt, and 141538 tokens/s."""
    del found["servers"][1]
    for server, seconds in zip(found["servers"], ([0.5, 0.7], times), strict=True):
        server["prefill"]["4096"] = seconds
    text = "\n".join(result.answer(result.derive(found)))
    assert "to the first token of a prompt of 4096: no telling, its times scatter more" in text
    assert "answer at 8.3 tokens/s" in text


def test_other_settings_than_the_tutorials_are_told(found: dict[str, Any]) -> None:
    found["settings"] = {"KT_MAX_DEFERRED_EXPERTS_PER_TOKEN": "2"}
    first = result.answer(found)[0]
    assert first.endswith("on the GPU; KT_MAX_DEFERRED_EXPERTS_PER_TOKEN=2:")


def test_routing_that_is_always_the_same_is_told(found: dict[str, Any]) -> None:
    assert "Do not trust" not in "\n".join(result.answer(found))
    found["servers"][-1]["decode"]["8"] = found["servers"][-1]["decode"]["1"] | {"uniform": 57.2}
    assert "Do not trust the figure of 8 requests" in "\n".join(result.answer(found))


def test_the_parts_of_a_step_add_up(found: dict[str, Any]) -> None:
    parts = result.parts_of_step(found)
    assert parts is not None
    assert sum(parts.values()) == pytest.approx(0.121)
    assert parts["reading the experts"] == pytest.approx(0.1055, rel=0.01)
    assert parts["CPU experts besides reading"] == pytest.approx(58 * 1.905e-3 - 0.1055, rel=0.05)
    assert parts["starting and ending calls"] == pytest.approx(58 * 45e-6)
    assert parts["copies"] == pytest.approx(58e-5)
    assert parts["GPU kernels"] == pytest.approx(0.0005 + 58e-4)
    assert parts["GPU idle"] == pytest.approx(1e-4)
    assert found["parts"] == parts
    for server in found["servers"][:2]:
        server["step"] = None
    found = result.derive(found)
    assert found["parts"] is None
    assert "the CPUs' experts take 73% of a step of 8 MoE layers" in "\n".join(result.answer(found))


def test_an_older_results_parts_keep_their_names(found: dict[str, Any]) -> None:
    """Those measured with host functions are told as such."""
    found["parts"] = {"host functions and waking": 0.0121}
    assert "host functions and waking 12.1 ms (10%)." in "\n".join(result.answer(found))


def test_one_number_of_layers_makes_no_promise(found: dict[str, Any]) -> None:
    found = result.derive(found | {"servers": found["servers"][-1:]})
    text = "\n".join(result.answer(found))
    assert "ask for two or more" in text
    assert "tokens/s" not in text


def test_memory_is_told_of_the_largest_server_which_may_be_the_check(
    found: dict[str, Any],
) -> None:
    """That of 8 layers, 6 GB besides its experts, would promise too little."""
    check = copy.deepcopy(SERVERS[-1]) | {"layers": 16, "memory_bytes": 5.82e9 * 16 + 9e9}
    before = result.fits(found["servers"], 100, "int4")
    found = result.derive(found | {"check": check | {"card_bytes": 14 * 2**30}})
    assert found["fits"] == before  # it takes no part
    text = "\n".join(result.answer(found))
    assert "16 MoE layers measured, and the line through 1 and 4 and 8, without them" in text
    assert "Memory: 346 GB" in text
    assert "of 16 MoE layers 11.0 computed, 14.0 seen" in text
