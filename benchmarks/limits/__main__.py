"""``python -m benchmarks.limits``: print the machine's limits at one thread and at all."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import limits
from benchmarks.errors import BenchmarkError
from benchmarks.host_description import allowed_cpus, cpu_brand, describe, last_level_cache_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits", description="Measure read bandwidth and int8 peak."
    )
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all allowed CPUs")
    parser.add_argument("--seconds", type=float, default=3.0, help="of reads for each (3)")
    parser.add_argument("--probe", type=Path, help="a probe that was built elsewhere")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args()
    threads = args.threads or sorted({1, len(allowed_cpus())})
    print(f"{cpu_brand()}; last-level cache {last_level_cache_bytes() >> 20} MiB")
    print(f"{'threads':>7}  {'limit':<22}{'best':>10}{'median':>10}{'spread':>8}")
    found = []
    try:
        for count in threads:
            result = limits.measure(count, args.seconds, args.probe)
            found.append(result.to_json())
            rows = [("read, GB/s", result.read)]
            rows += [(f"int8 {isa}, GOP/s", rate) for isa, rate in result.int8.items()]
            for name, rate in rows:
                print(
                    f"{count:>7}  {name:<22}{rate.best:>10.1f}{rate.median:>10.1f}"
                    f"{rate.spread:>8.1%}",
                    flush=True,
                )
            for isa, cores in result.cores.items():
                states = {"quiet core": cores.quiet, "busy sibling": cores.disturbed}
                for state, seen in states.items():
                    if seen is not None:
                        print(
                            f"{'':>7}  {f'  {isa}, {state}':<22}{seen.best:>10.1f}"
                            f"{seen.median:>10.1f}{seen.spread:>8.1%}"
                        )
                print(f"{'':>7}    {cores.quiet_share:.0%} of {cores.samples} samples quiet")
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "limits": found}, indent=1))


if __name__ == "__main__":
    main()
