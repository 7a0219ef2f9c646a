"""Results to Markdown, and that the document's tables are those of its result files."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_moe, result_tables
from benchmarks.engines import ENGINES
from benchmarks.errors import BenchmarkError
from tests.mutations import damaged_bytes, damaged_json, fuzz, put


def cell(tokens: int, ms: float, reads: float, gops: float, ratio: float) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "ms": ms,
        "spread": 0.01,
        "weights GB/s": reads,
        "GOP/s": gops,
        "ratio to ours": ratio,
    }


RESULT: dict[str, Any] = {
    "schema": result_tables.SCHEMA,
    "date": "2026-01-02",
    "command": "python -m benchmarks.bench_moe",
    "quick": False,
    "machine": {
        "cpu": "CPU",
        "cpus": 2,
        "last_level_cache_bytes": 32 << 20,
        "memory_bytes": 1,
        "kernel": "6.1",
    },
    "experts": 32,
    "runs": [
        {
            "threads": 2,
            "limits": {
                "threads": 2,
                "read": {"best": 40.0, "median": 39.0, "spread": 0.01},
                "int8": {
                    "avx2": {"best": 400.0, "median": 399.0, "spread": 0.0},
                    "avx512_vnni": {"best": 1000.0, "median": 990.0, "spread": 0.0},
                },
            },
            "engines": [
                {
                    "key": "ours-int4",
                    "label": "ours INT4",
                    "class": 4,
                    "bits": 4.125,
                    "runs_on": "avx2",
                    "version": "this checkout",
                    "error": {"gaussian": 0.1379, "t5": 0.1701},
                    "cells": [cell(1, 8.234, 30.0, 85.0, 1.0), cell(128, 500.4, 1.0, 250.0, 1.0)],
                },
                {
                    "key": "baseline",
                    "label": "baseline X",
                    "class": 4,
                    "bits": 4.5,
                    "runs_on": "AVX2",
                    "version": "0.1",
                    "error": {"gaussian": 0.1246, "t5": 0.146},
                    "cells": [cell(1, 16.5, 15.0, 43.0, 2.004)],
                    "too slow": {"128": 12.3},
                },
                {
                    "key": "gone",
                    "label": "baseline Y",
                    "class": 4,
                    "unavailable": "needs AVX-512",
                },
            ],
        }
    ],
}


def test_shares_are_of_reads_when_few_tokens_and_of_the_peak_when_many() -> None:
    text = result_tables.render([RESULT])
    row = next(line for line in text.splitlines() if line.startswith("| **ours INT4**"))
    assert row == (
        "| **ours INT4** | 8.23 ms, 75% | 500 ms, 250 GOP/s, 25% | 4.12 | 0.138 / 0.170 |"
    )


def test_ratios_and_what_was_not_measured_are_shown() -> None:
    text = result_tables.render([RESULT])
    assert "| baseline X | 16.5 ms, 38% | (about 12 s) | 4.50 | 0.125 / 0.146 |" in text
    assert "| baseline X | 2.00 |  |" in text
    assert "- baseline Y: **not measured**: needs AVX-512" in text
    assert "quick" not in text


def test_rounds_that_differ_are_shown_to_differ() -> None:
    result = copy.deepcopy(RESULT)
    result["runs"][0]["engines"][0]["cells"][0]["spread"] = 0.237
    assert "| **ours INT4** | 8.23 ms ±24%, 75% | 500 ms, 250 GOP/s" in result_tables.render(
        [result]
    )


def test_quiet_and_disturbed_cores_are_told_apart() -> None:
    assert "Single cores" not in result_tables.render([RESULT])
    result = copy.deepcopy(RESULT)
    rate = {"best": 3400.0, "median": 3300.0, "spread": 0.0}
    states = {"quiet": rate, "disturbed": None, "samples": 8, "quiet_share": 0.5}
    result["runs"][0]["limits"]["cores"] = {"amx_loaded": states}
    assert (
        "Single cores, AMX with operands loaded from cache: 3300 GOP/s on a quiet core; 50% of the "
        "samples quiet." in result_tables.render([result])
    )


def test_times_are_told_by_the_cores_state() -> None:
    result = copy.deepcopy(RESULT)
    cells = result["runs"][0]["engines"][0]["cells"]
    times, quiet = [500.0, 300.0, 320.0, 400.0], [0.0, 1.0, 0.75, 0.5]
    cells[1]["states"] = bench_moe.by_state(times, quiet)
    assert cells[1]["states"] == {"quiet": 310.0, "disturbed": 500.0, "share": 0.5625}
    shown = "250 GOP/s, 25% (310 ms quiet, 500 ms disturbed, 56% of cores quiet)"
    assert shown in result_tables.render([result])
    cells[1]["states"] = bench_moe.by_state([400.0], [0.5])
    assert "250 GOP/s, 25% (50% of cores quiet)" in result_tables.render([result])


def test_a_rehearsal_is_its_answer() -> None:
    path = result_tables.RESULTS / "rehearsal-h200-int4.json"
    text = result_tables.render([result_tables.load(path)])
    assert "With this machine V3.2 will" in text


def test_a_quick_run_is_called_one() -> None:
    assert "A quick run" in result_tables.render([RESULT | {"quick": True}])


def test_an_engine_that_stopped_keeps_its_cells_and_its_reason() -> None:
    result = copy.deepcopy(RESULT)
    result["runs"][0]["engines"][1]["unavailable"] = "its process ended with signal SIGILL"
    text = result_tables.render([result])
    assert "| baseline X | 16.5 ms, 38%" in text
    assert "- baseline X 0.1: **not measured**: its process ended with signal SIGILL" in text


def test_only_marked_parts_of_the_document_change(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text(json.dumps(RESULT))
    document = (
        "a\n<!-- results here -->\nold\n<!-- end -->\nb\n<!-- results gone -->\n<!-- end -->\n"
    )
    filled = result_tables.fill(document, tmp_path)
    assert filled.startswith("a\n<!-- results here -->\n\nCPU, 2 CPUs")
    assert "old" not in filled
    assert f"![Roofline]({tmp_path.name}/here.png)\n\n<!-- end -->\nb\n" in filled
    assert filled.endswith("<!-- results gone -->\n\n*Not measured yet.*\n\n<!-- end -->\n")
    assert result_tables.fill(filled, tmp_path) == filled


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None, expected 1"),
        ('{"schema": 0}', "has schema 0, expected 1"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_not_a_result_is_one_clear_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        result_tables.load(path)


@fuzz()
@given(data=st.data())
def test_a_damaged_result_is_shown_or_one_clear_error(data: st.DataObject, tmp_path: Path) -> None:
    content = data.draw(st.sampled_from(sorted(result_tables.RESULTS.glob("*.json")))).read_bytes()
    path = put(tmp_path / "a", data.draw(st.one_of(damaged_json(content), damaged_bytes(content))))
    with contextlib.suppress(BenchmarkError):
        result_tables.render([result_tables.load(path)])


def test_engines_have_todays_names(tmp_path: Path) -> None:
    result = copy.deepcopy(RESULT)
    result["runs"][0]["engines"][1] |= {"key": ENGINES[2].key, "label": "its name back then"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = result_tables.render([result_tables.load(tmp_path / "result.json")])
    assert f"| {ENGINES[2].label} | 16.5 ms" in text
    assert "back then" not in text
    assert "- baseline Y:" in text  # no engine of ours


def test_the_document_shows_what_its_result_files_say() -> None:
    document = result_tables.DOCUMENT.read_text()
    assert result_tables.fill(document, result_tables.RESULTS) == document, (
        "docs/performance.md is stale: run python -m benchmarks.result_tables --write"
    )


def test_every_result_file_is_shown_with_its_plot() -> None:
    files = sorted(result_tables.RESULTS.glob("*.json"))
    assert files
    document = result_tables.DOCUMENT.read_text()
    for path in files:
        assert f"<!-- results {path.stem} -->" in document
        assert path.with_suffix(".png").is_file()
