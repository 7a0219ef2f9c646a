"""What quantising the experts changes in the answers and in the next-token distributions.

    python -m benchmarks.quality tiny                     # the table of docs/accuracy.md
    python -m benchmarks.quality ask --base-url URL --output a.jsonl [--prompts FILE]
    python -m benchmarks.quality compare a.jsonl b.jsonl

``ask`` puts each prompt to a running SGLang server twice: as a chat through the OpenAI API, at
temperature 0, for the answer, and as text with the expected answer through ``/generate`` (whose
OpenAI counterpart gives no log-probabilities of a prompt) for the distribution of each token.
A line is appended for each finished prompt, and prompts that have one are not asked again.

``--prompts`` is a file of JSON lines with ``id``, ``task``, ``question`` and ``answer``; the
default is the tiny model's held-out set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.quality import tiny
from benchmarks.quality.answers import ask, read_prompts, read_results
from benchmarks.quality.compare import comparison, summary


def main(argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for bad input or a missing server."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("ask", help="ask a running server")
    one.add_argument("--base-url", required=True)
    one.add_argument("--model", default="DeepSeek-V3.2", help="its name in the API")
    one.add_argument("--prompts", type=Path, help="JSON lines; default: the tiny model's")
    one.add_argument("--output", type=Path, required=True, help="results, appended to")
    two = commands.add_parser("compare", help="compare the results of two servers")
    two.add_argument("original", type=Path)
    two.add_argument("other", type=Path)
    three = commands.add_parser("tiny", help="measure the tiny model's formats")
    three.add_argument("--work", type=Path, default=Path(".cache/quality"))
    three.add_argument("--only", help="one variant, to measure in pieces")
    args = parser.parse_args(argv)

    try:
        if args.command == "ask":
            prompts = read_prompts(args.prompts) if args.prompts else tiny.prompts()
            results = ask(args.base_url, args.model, prompts, args.output)
            print(comparison({args.output.name: summary(results, results)}))
        elif args.command == "compare":
            original, other = read_results(args.original), read_results(args.other)
            if not original or not other:
                raise BenchmarkError("nothing to compare: one of the files has no results")
            rows = {args.original.name: original, args.other.name: other}
            print(comparison({name: summary(original, rows[name]) for name in rows}))
        else:
            tiny.run(args.work, args.only)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
