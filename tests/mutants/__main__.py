"""``python -m tests.mutants``: put each fault into a copy of the tree, and say which test finds it.

Exit status: 0 all were found; 1 one was not; 2 the faults or the tree are not as they should be.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.mutants.faults import TABLE, Fault, read_table
from tests.mutants.judge import Judge, Verdict, as_json, as_markdown
from tests.mutants.tree import Tree, TreeError

ROOT = Path(__file__).parents[2]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", metavar="ID,...", help="these faults; all if not given")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default 1)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table there, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep the copy and its build there for other runs"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def choose(faults: Sequence[Fault], only: str | None) -> list[Fault]:
    """The faults that ``--only`` names, in the table's order.

    Raises:
        ValueError: it names one that there is not.
    """
    if only is None:
        return list(faults)
    wanted = only.split(",")
    if unknown := [name for name in wanted if name not in {fault.id for fault in faults}]:
        raise ValueError(f"there is no fault {', '.join(unknown)}: see --list")
    return [fault for fault in faults if fault.id in wanted]


def run(arguments: argparse.Namespace, faults: Sequence[Fault]) -> int:
    verdicts: list[Verdict] = []
    with ExitStack() as stack:
        folder = arguments.work
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kt-mutants-"))
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_relative_to(arguments.root.resolve()):
            raise TreeError(f"--work {folder} is in the repository: name a folder outside")
        tree = Tree(arguments.root, folder, arguments.jobs)
        started = time.monotonic()

        def say(text: str) -> None:
            print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

        say(f"copying and building {arguments.root}")
        tree.make()
        judge = Judge(tree, folder)
        say(f"running the tests of {len(faults)} faults without any")
        judge.check_sound(faults)
        try:
            for fault in faults:
                verdicts.append(judge.judge(fault))
                say(verdicts[-1].line())
        finally:  # an interruption leaves what is known
            if arguments.markdown:
                arguments.markdown.write_text(as_markdown(verdicts))
            if arguments.json:
                arguments.json.write_text(as_json(verdicts))
        missed = [verdict for verdict in verdicts if verdict.problem]
        say(f"{len(verdicts) - len(missed)} of {len(verdicts)} faults were found")
        return int(bool(missed))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        faults = choose(read_table(arguments.table), arguments.only)
        if arguments.list:
            for fault in faults:
                print(f"{fault.id}: {fault.file}: {fault.harm}")
            return 0
        if problems := [text for fault in faults if (text := fault.problem(arguments.root))]:
            raise ValueError("\n".join(problems))
        return run(arguments, faults)
    except (OSError, ValueError, TreeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the checkout was never changed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # As Ctrl-C does: what was started is ended, and the copy removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
