"""Time one MoE layer of V3.2's shape, side by side with the engines people use otherwise.

    python -m benchmarks.bench_moe [--threads N ...] [--quick] [--baselines-dir DIR] [--json FILE]

Hidden size 7168, intermediate 2048, 32 experts, 8 distinct ones for each token; each call routes
anew, and the experts together are larger than the caches, so weights come from memory. Engines run
in processes of their own and are asked in turn, round after round: ours, a baseline, ours, ...; all
but the one being timed are stopped. A cell is the median over rounds of the median of a round; a
ratio is the median over rounds of the two engines' ratio within a round. Limits are measured in the
same run, before and after.

Each engine's output for small inputs is compared with a float layer of the same source weights
first: the error is that of its format and its arithmetic together.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import limits, result_tables, stats
from benchmarks.baselines import Baselines, default_folder
from benchmarks.engines import ENGINES, EngineSpec
from benchmarks.errors import BenchmarkError
from benchmarks.host_description import allowed_cpus, describe
from benchmarks.layer_inputs import CHECK_TOKENS, write_checks, write_sources
from benchmarks.plot import roofline
from benchmarks.worker_process import WORKERS, Worker, WorkerFailed
from benchmarks.workers.protocol import EXPERT_WEIGHTS, TOP_K

TOKENS = (1, 8, 32, 128, 512)
_CALLS = 20  # of one engine in one round, at most
_ANSWER_SECONDS = 240.0
_MOSTLY = 0.25  # of the cores in the other state, at most
_WRONG = 0.8  # error above which an output has little to do with the layer


@dataclass(frozen=True)
class Plan:
    """What is measured: see ``main``'s options."""

    tokens: tuple[int, ...]
    experts: int
    rounds: int
    seconds: float
    limit_seconds: float
    longest_call: float  # seconds; an engine that would take longer is not asked


def run(
    threads: int,
    engines: Sequence[EngineSpec],
    plan: Plan,
    baselines: Baselines | None,
    sources: Path,
    checks: dict[str, list[Path]],
) -> dict[str, Any]:
    """Limits and all engines with ``threads`` threads, as one entry of the results' "runs"."""
    probe = baselines.probe if baselines else None
    before = limits.measure(threads, plan.limit_seconds, probe)
    workers: dict[str, Worker] = {}
    rows: list[dict[str, Any]] = []
    try:
        for spec in engines:
            row = {"key": spec.key, "label": spec.label, "class": spec.bits}
            rows.append(row)
            try:
                workers[spec.key] = worker = _start(spec, threads, plan, baselines, sources)
                row |= worker.description
                if spec.package and baselines:
                    row["version"] = baselines.versions[spec.package]
                if spec.checked:
                    row["error"] = _errors(worker, checks)
                _say(f"{spec.label}: {row['runs_on']}; error {row.get('error', 'not defined')}")
            except WorkerFailed as why:
                workers.pop(spec.key, None)
                row["unavailable"] = str(why)
                _say(f"{spec.label}: not measured: {why}")
        for tokens in plan.tokens:
            _time_rounds(tokens, threads, engines, plan, workers, rows, probe)
    finally:
        for worker in workers.values():
            worker.close()
    after = limits.measure(threads, plan.limit_seconds, probe)
    return {"threads": threads, "limits": _better(before, after).to_json(), "engines": rows}


def _start(
    spec: EngineSpec, threads: int, plan: Plan, baselines: Baselines | None, sources: Path
) -> Worker:
    if spec.package and baselines is None:
        raise WorkerFailed("left out (--no-baselines)")
    job = {
        "method": spec.method,
        "threads": threads,
        "experts": plan.experts,
        "max_tokens": max(plan.tokens),
        "sources": str(sources),
        "baseline": spec.folder(baselines) if spec.package and baselines else "",
    }
    log = sources / f"{spec.key}.log"
    return Worker(WORKERS / f"{spec.worker}.py", job, log, _ANSWER_SECONDS)


def _errors(worker: Worker, checks: dict[str, list[Path]]) -> dict[str, float]:
    """Distribution of the weights -> the larger error of the two sizes of call.

    Raises:
        WorkerFailed: an output that is not the layer's.
    """
    found = {}
    for name, files in checks.items():
        found[name] = round(max(worker.ask(check=str(f))["error"] for f in files), 4)
        if not found[name] < _WRONG:
            worker.close()
            raise WorkerFailed(f"wrong result: error {found[name]} for {name} weights")
    return found


def _time_rounds(
    tokens: int,
    threads: int,
    engines: Sequence[EngineSpec],
    plan: Plan,
    workers: dict[str, Worker],
    rows: list[dict[str, Any]],
    probe: Path | None,
) -> None:
    """Add ``tokens``' results to ``rows``; an engine that dies is reported and left out."""
    by_key = {row["key"]: row for row in rows}
    rounds: dict[str, list[float]] = {}
    distinct: dict[str, list[float]] = {}
    quiet: dict[str, list[float]] = {}
    asked = []
    for spec in engines:
        if spec.key not in workers or tokens < spec.min_tokens:
            continue
        done = by_key[spec.key].get("cells", [])
        expected = done[-1]["ms"] / 1e3 * tokens / done[-1]["tokens"] if done else 0.0
        if expected > plan.longest_call:
            by_key[spec.key].setdefault("too slow", {})[str(tokens)] = expected
            _say(f"{spec.label}: {tokens} tokens left out, they would take {expected:.0f} s")
        else:
            asked.append(spec)
    for number in range(plan.rounds + 1):
        # The first round only warms up. The order turns, so that nobody is always after the same.
        shift = number % max(1, len(asked))
        for spec in asked[shift:] + asked[:shift]:
            if spec.key not in workers:
                continue
            seconds, calls = (plan.seconds, _CALLS) if number else (0.0, 1)
            request = {"time": tokens, "seed": 1000 * tokens + number}
            before = limits.quiet_share(threads, probe)
            try:
                answer = workers[spec.key].ask(**request, seconds=seconds, calls=calls)
            except WorkerFailed as why:
                workers.pop(spec.key)
                by_key[spec.key]["unavailable"] = str(why)
                _say(f"{spec.label}: stopped at {tokens} tokens: {why}")
                continue
            if number:
                rounds.setdefault(spec.key, []).append(stats.median(answer["ms"]))
                distinct.setdefault(spec.key, []).append(stats.median(answer["experts"]))
                after = limits.quiet_share(threads, probe)
                if before is not None and after is not None:
                    quiet.setdefault(spec.key, []).append(min(before, after))
    for key, times in rounds.items():
        row = by_key[key]
        if key not in workers:
            continue
        milliseconds = stats.median(times)
        experts = stats.median(distinct[key]) if "error" in row else 1  # the dense product has one
        read = experts * EXPERT_WEIGHTS * row["bits"] / 8
        cell = {
            "tokens": tokens,
            "ms": milliseconds,
            "spread": stats.spread(times),
            "weights GB/s": read / milliseconds / 1e6,
            "GOP/s": 2 * EXPERT_WEIGHTS * TOP_K * tokens / milliseconds / 1e6,
        }
        if key in quiet:
            cell["states"] = by_state(times, quiet[key])
        ours = "ours-int4" if row["class"] == 4 else "ours-int8"
        if ours in workers and ours in rounds:
            cell["ratio to ours"] = stats.paired_ratio(times, rounds[ours])
        row.setdefault("cells", []).append(cell)
        _say(
            f"{threads} threads, {tokens:>3} tokens, {row['label']:<28}{milliseconds:9.2f} ms "
            f"+-{cell['spread']:4.0%} {cell['weights GB/s']:7.1f} GB/s {cell['GOP/s']:8.0f} GOP/s"
        )


def by_state(times: Sequence[float], quiet: Sequence[float]) -> dict[str, float | None]:
    """Median times of the rounds in which at least three quarters of the cores were ``quiet``, and
    of those in which at least as many were ``disturbed``; and the mean ``share`` of quiet ones.

    Args:
        times: of the rounds.
        quiet: share of quiet cores before and after each, the smaller of the two.
    """
    pairs = list(zip(times, quiet, strict=True))
    states = {
        "quiet": [time for time, share in pairs if share >= 1 - _MOSTLY],
        "disturbed": [time for time, share in pairs if share <= _MOSTLY],
    }
    found = {name: stats.median(rounds) if rounds else None for name, rounds in states.items()}
    return {**found, "share": sum(quiet) / len(quiet)}


def _better(a: limits.Limits, b: limits.Limits) -> limits.Limits:
    """Limits are what the machine can do: the better of two measurements, one by one."""

    def best(x: limits.Measured, y: limits.Measured) -> limits.Measured:
        return x if x.best >= y.best else y

    int8 = {isa: best(a.int8[isa], b.int8[isa]) for isa in a.int8}
    # Of the cores' states, the measurement with more quiet samples says more.
    cores = {
        isa: max((a.cores[isa], b.cores[isa]), key=lambda found: found.quiet_share)
        for isa in a.cores
    }
    return limits.Limits(a.threads, best(a.read, b.read), int8, cores)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _command() -> str:
    """The command that gives these numbers, with what the environment says of our kernels."""
    target = os.environ.get("KT_TARGET")
    command = shlex.join(["python", "-m", "benchmarks.bench_moe", *sys.argv[1:]])
    return f"KT_TARGET={target} {command}" if target else command


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_moe",
        description="Time one MoE layer of V3.2's shape beside the baselines.",
    )
    add = parser.add_argument
    everyone = len(allowed_cpus())
    add("--threads", type=int, nargs="+", help="each is one run (all allowed CPUs, and 1)")
    add("--tokens", type=int, nargs="+", help=f"tokens of a call ({' '.join(map(str, TOKENS))})")
    add("--experts", type=int, help="of the layer (32); more where caches are very large")
    add("--rounds", type=int, help="of all engines, after one to warm up (5)")
    add("--seconds", type=float, help="for one engine in one round (0.4)")
    add("--quick", action="store_true", help="under a minute: few calls, a small layer, one run")
    add("--engines", nargs="+", choices=[s.key for s in ENGINES], help="only these")
    add("--no-baselines", action="store_true", help="ours and the limits only")
    add("--baselines-dir", type=Path, help="made by 'python -m benchmarks.baselines prepare'")
    add("--json", type=Path, help="write the results there")
    add("--plot", type=Path, help="write a roofline of the first run there, a PNG")
    args = parser.parse_args()
    quick = args.quick
    args.threads = args.threads or ([everyone] if quick else sorted({1, everyone}, reverse=True))
    args.plan = Plan(
        tokens=tuple(args.tokens or ((1, 32) if quick else TOKENS)),
        experts=args.experts or (16 if quick else 32),
        rounds=args.rounds or (2 if quick else 5),
        seconds=args.seconds or (0.1 if quick else 0.4),
        limit_seconds=0.3 if quick else 2.0,
        longest_call=1.5 if quick else 8.0,
    )
    return args


def _check_arguments(args: argparse.Namespace) -> None:
    everyone = len(allowed_cpus())
    for threads in args.threads:
        if not 1 <= threads <= everyone:
            raise BenchmarkError(
                f"--threads {threads}: expected 1 to {everyone}, the CPUs this process may use"
            )
    # Half of the experts have weights of one distribution, and a token takes 8 distinct ones.
    if args.plan.experts < 2 * TOP_K or args.plan.experts % 4:
        raise BenchmarkError(
            f"--experts {args.plan.experts}: expected a multiple of 4, at least {2 * TOP_K}"
        )
    if min(args.plan.tokens) < 1 or args.plan.rounds < 1:
        raise BenchmarkError("--tokens and --rounds: expected at least 1")


def _baselines(args: argparse.Namespace) -> Baselines | None:
    if args.no_baselines:
        return None
    if args.baselines_dir:
        return Baselines.open(args.baselines_dir)
    from benchmarks.baselines.prepare import ensure

    ensure(default_folder())
    return Baselines.open(default_folder())


def main() -> None:
    args = _parse()
    try:
        _check_arguments(args)
        baselines = _baselines(args)
        engines = [
            spec
            for spec in ENGINES
            if spec.min_tokens <= max(args.plan.tokens)
            and (not args.engines or spec.key in args.engines)
        ]
        result: dict[str, Any] = {
            "schema": result_tables.SCHEMA,
            "date": time.strftime("%Y-%m-%d"),
            "command": _command(),
            "quick": args.quick,
            "machine": describe(),
            "experts": args.plan.experts,
            "runs": [],
        }
        with tempfile.TemporaryDirectory(prefix="bench-moe-") as folder:
            sources = Path(folder)
            write_sources(sources, each=1 if args.quick else 2)
            sizes = CHECK_TOKENS[: 1 if args.quick else None]
            checks = write_checks(sources, args.plan.experts, sizes)
            for threads in args.threads:
                found = run(threads, engines, args.plan, baselines, sources, checks)
                result["runs"].append(found)
                if args.json:  # after each run, so that a long benchmark is never all lost
                    args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(result_tables.render([result]))
        if args.plot:
            roofline(result["machine"], result["runs"][0], args.plot)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
