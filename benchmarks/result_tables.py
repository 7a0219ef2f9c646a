"""Results of ``bench_moe`` and of the rehearsal as Markdown, for docs/performance.md.

    python -m benchmarks.result_tables FILE.json ...     print the tables
    python -m benchmarks.result_tables --write           renew docs/performance.md and its plots

In the document, what stands between ``<!-- results NAME -->`` and ``<!-- end -->`` is the rendering
of docs/performance/NAME.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import ENGINES
from benchmarks.errors import NOT_AS_EXPECTED, BenchmarkError
from benchmarks.limits import Limits
from benchmarks.markdown import table
from benchmarks.plot import roofline
from benchmarks.rehearsal import result as rehearsal
from benchmarks.rehearsal.plot import draw
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import parse_json, read_file

SCHEMA = 1
ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "performance"

#: Up to this many tokens a call is held against the read bandwidth, above it against the peak.
_MOST_DECODE_TOKENS = 32
#: A larger spread of the rounds (interquartile range over median) is shown beside the time.
_STEADY = 0.1
_ISA_NAMES = {
    "avx2": "AVX2",
    "avx512_vnni": "AVX-512 VNNI",
    "amx": "AMX",
    "amx_loaded": "AMX with operands loaded from cache",
}

#: An engine is called what it is called today, whenever its results were taken.
_LABELS = {engine.key: engine.label for engine in ENGINES}

Json = dict[str, Any]


def load(path: Path) -> Json:
    """A result file.

    Raises:
        BenchmarkError: it is missing, not JSON, or not a result of this version.
    """
    try:
        result = parse_json(read_file(path))
    except UserError as error:
        raise BenchmarkError(f"cannot read a result: {error}") from None
    except ValueError:
        raise BenchmarkError(f"{path} is not JSON: expected a file of bench_moe --json") from None
    found = result.get("schema") if isinstance(result, dict) else None
    if not isinstance(result, dict) or found != SCHEMA:
        raise BenchmarkError(
            f"{path} has schema {found}, expected {SCHEMA}: run bench_moe --json again"
        )
    try:
        for run in result.get("runs") or []:  # a rehearsal has none
            for row in run["engines"]:
                row["label"] = _LABELS.get(row["key"], row["label"])
        render([result])
    except NOT_AS_EXPECTED:
        raise BenchmarkError(
            f"{path} is not a whole result: run the benchmark with --json again"
        ) from None
    return result


def render(results: Sequence[Json]) -> str:
    """Markdown of results, one section of tables for each run."""
    return "\n\n".join(_render_result(result) for result in results)


def _is_rehearsal(result: Json) -> bool:
    return bool(result.get("kind") == rehearsal.KIND)


def _render_rehearsal(result: Json) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['date']}, {versions}, {result['threads']} threads:", ""]
    lines += [f"    {line}" for line in [result["command"], "", *rehearsal.answer(result)]]
    return "\n".join(line.rstrip() for line in lines)


def _render_result(result: Json) -> str:
    if _is_rehearsal(result):
        return _render_rehearsal(result)
    machine = result["machine"]
    cache = machine["last_level_cache_bytes"] / 2**20
    lines = [
        f"{machine['cpu']}, {machine['cpus']} CPUs, last-level cache {cache:.0f} MiB, Linux "
        f"{machine['kernel']}; {result['experts']} experts; {result['date']}.",
        "",
        f"    {result['command']}",
    ]
    if result["quick"]:
        lines += ["", "A quick run: too short and too small to quote."]
    for run in result["runs"]:
        lines += ["", *_render_run(run)]
    return "\n".join(lines)


def _render_run(run: Json) -> list[str]:
    measured = Limits.from_json(run["limits"])
    tokens = sorted({cell["tokens"] for row in run["engines"] for cell in row.get("cells", [])})
    peaks = "; ".join(
        f"{_ISA_NAMES.get(isa, isa)} int8 {_number(rate.best)} GOP/s"
        for isa, rate in measured.int8.items()
    )
    count = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    lines = [
        f"**{count}.** Limits measured in the same run: reads {measured.read.best:.1f} GB/s "
        f"(median {measured.read.median:.1f}); {peaks}.",
        "",
    ]
    lines += _core_states(measured)
    rows = [row for row in run["engines"] if row.get("cells")]
    head = ["engine", *(_tokens(t) for t in tokens), "bits", "error Gaussian / t5"]
    body = []
    for row in rows:
        cells = {cell["tokens"]: cell for cell in row["cells"]}
        found = [_cell(cells[t], measured) if t in cells else _too_slow(row, t) for t in tokens]
        body.append([_bold(row, row["label"]), *found, f"{row['bits']:.2f}", _error(row)])
    lines += table(head, body)
    compared = [
        row
        for row in rows
        if not _is_ours(row) and any("ratio to ours" in cell for cell in row["cells"])
    ]
    if compared:
        lines += ["", "Time over ours of the same bits, pair by pair (2.0: ours is twice as fast):"]
        body = []
        for row in compared:
            ratios = {cell["tokens"]: cell.get("ratio to ours") for cell in row["cells"]}
            shown = [f"{ratios[t]:.2f}" if ratios.get(t) else "" for t in tokens]
            body.append([row["label"], *shown])
        lines += ["", *table(["engine", *(_tokens(t) for t in tokens)], body)]
    lines += ["", "What ran:", ""]
    for row in run["engines"]:
        what = row.get("runs_on", "")
        version = f" {row['version']}" if row.get("version") else ""
        if row.get("unavailable"):
            what = f"**not measured**: {row['unavailable']}"
        lines.append(f"- {row['label']}{version}: {what}")
    return lines


def _core_states(measured: Limits) -> list[str]:
    """A sentence on tiles with loads, quiet cores and disturbed ones apart; nothing without AMX."""
    cores = measured.cores.get("amx_loaded")
    if cores is None:
        return []
    rates = {"on a quiet core": cores.quiet, "beside a busy hyperthread": cores.disturbed}
    said = [
        f"{_number(rate.median)} GOP/s {where}" for where, rate in rates.items() if rate is not None
    ]
    states = ", ".join(said) or "in neither state"
    return [
        f"Single cores, AMX with operands loaded from cache: {states}; {cores.quiet_share:.0%} of "
        "the samples quiet.",
        "",
    ]


def _is_ours(row: Json) -> bool:
    return bool(row["key"].startswith("ours-"))


def _bold(row: Json, text: str) -> str:
    return f"**{text}**" if _is_ours(row) else text


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _number(value: float) -> str:
    """Three significant digits, none of them behind the point from 100 on."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(cell: Json, measured: Limits) -> str:
    milliseconds = f"{_number(cell['ms'])} ms"
    if cell["spread"] > _STEADY:
        milliseconds += f" ±{cell['spread']:.0%}"
    if cell["tokens"] <= _MOST_DECODE_TOKENS:
        return f"{milliseconds}, {cell['weights GB/s'] / measured.read.best:.0%}"
    share = cell["GOP/s"] / measured.peak[1]
    return f"{milliseconds}, {_number(cell['GOP/s'])} GOP/s, {share:.0%}{_by_state(cell)}"


def _by_state(cell: Json) -> str:
    """Times on quiet cores and on disturbed ones; nothing of results without AMX, or older ones."""
    states = cell.get("states")
    if states is None:
        return ""
    said = [
        f"{_number(states[name])} ms {name}"
        for name in ("quiet", "disturbed")
        if states[name] is not None
    ]
    said.append(f"{states['share']:.0%} of cores quiet")
    return f" ({', '.join(said)})"


def _too_slow(row: Json, tokens: int) -> str:
    seconds = row.get("too slow", {}).get(str(tokens))
    return f"(about {seconds:.0f} s)" if seconds else ""


def _error(row: Json) -> str:
    error = row.get("error")
    return f"{error['gaussian']:.3f} / {error['t5']:.3f}" if error else ""


_MARKED = re.compile(r"(<!-- results ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(document: str, results: Path) -> str:
    """``document`` with the rendering of each marked result file of the folder ``results``."""

    def section(found: re.Match[str]) -> str:
        path = results / f"{found[2]}.json"
        if not path.exists():
            text = "*Not measured yet.*"
        else:
            text = render([load(path)])
            picture = "Lines and one turn" if _is_rehearsal(load(path)) else "Roofline"
            text += f"\n\n![{picture}]({results.name}/{found[2]}.png)"
        return f"{found[1]}\n{text}\n\n{found[4]}"

    return _MARKED.sub(section, document)


def _write() -> None:
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), RESULTS))
    for path in sorted(RESULTS.glob("*.json")):
        result = load(path)
        if _is_rehearsal(result):
            draw(result, path.with_suffix(".png"))
        else:
            roofline(result["machine"], result["runs"][0], path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.result_tables", description="Render results of bench_moe."
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json")
    parser.add_argument("--plot", type=Path, help="write a roofline of the first file's first run")
    parser.add_argument("--write", action="store_true", help="renew docs/performance.md")
    args = parser.parse_args()
    if not args.write and not args.files:
        parser.error("give result files, or --write")
    try:
        if args.write:
            _write()
        results = [load(path) for path in args.files]
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    if results:
        print(render(results))
        if args.plot:
            roofline(results[0]["machine"], results[0]["runs"][0], args.plot)


if __name__ == "__main__":
    main()
