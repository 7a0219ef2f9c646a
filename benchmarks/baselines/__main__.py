"""``python -m benchmarks.baselines prepare``: make a folder of them, also for another machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.baselines import default_folder, this_python
from benchmarks.baselines.prepare import prepare
from benchmarks.errors import BenchmarkError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="download and build the baselines into a folder")
    command.add_argument("--output", type=Path, help="default: below .cache/benchmarks")
    command.add_argument(
        "--python-version", default=this_python(), help="of the machine that will run them"
    )
    args = parser.parse_args()
    output = args.output or default_folder(args.python_version)
    try:
        prepare(output, args.python_version)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: baselines for Python {args.python_version}, {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
