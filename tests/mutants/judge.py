"""Runs a fault's tests and says which one found it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutants.faults import Fault
from tests.mutants.tree import RECORDER, Ended, Tree, TreeError

NOT_FOUND = "NOT FOUND"
DOES_NOT_COMPILE = "DOES NOT COMPILE"


@dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    Attributes:
        found_by: the test, and how unless it failed; empty if none did.
        problem: ``NOT FOUND`` or ``DOES NOT COMPILE``; empty if it was found.
        seconds: for compiler and tests.
    """

    fault: Fault
    found_by: str
    problem: str
    seconds: float

    def line(self) -> str:
        return f"{self.fault.id}: {self.problem or f'found by {self.found_by}'}"


@dataclass
class _Record:
    """What the recorder wrote down."""

    began: list[str]
    passed: set[str]
    failed: list[str]


class Judge:
    """Runs tests in a tree.

    Args:
        tree: made.
        folder: for files of its own.
    """

    def __init__(self, tree: Tree, folder: Path) -> None:
        self._tree, self._folder = tree, folder

    def check_sound(self, faults: Iterable[Fault]) -> None:
        """Run all tests of these faults on the sound tree.

        Raises:
            TreeError: one fails, or tests of a fault are all skipped here.
        """
        together: dict[str, set[str]] = {}
        for fault in faults:
            together.setdefault(fault.keyword, set()).update(fault.tests)
        passed: dict[str, set[str]] = {}
        for keyword, tests in together.items():
            ended, record = self._run(sorted(tests), keyword, 1800, ["--maxfail=5"])
            if ended.code != 0:
                failed = ", ".join(record.failed) or "pytest itself"
                raise TreeError(f"without any fault {failed} fails:\n{ended.output[-4000:]}")
            passed[keyword] = record.passed
        for fault in faults:
            for test in fault.tests:
                if not any(name.startswith(test) for name in passed[fault.keyword]):
                    raise TreeError(f"fault {fault.id}: no test of {test} ran here to its end")

    def judge(self, fault: Fault) -> Verdict:
        """Put the fault in, run its tests, and take it out again.

        Raises:
            TreeError: pytest could not run them.
        """
        started = time.monotonic()

        def verdict(found_by: str, problem: str = "") -> Verdict:
            return Verdict(fault, found_by, problem, round(time.monotonic() - started, 1))

        with self._tree.with_fault(fault) as compiler:
            if compiler:
                (self._folder / "compiler.log").write_text(compiler)
                return verdict("", DOES_NOT_COMPILE)
            ended, record = self._run(fault.tests, fault.keyword, fault.limit, ["-x", "--tb=no"])
        if record.failed:
            return verdict(record.failed[0])
        if ended.code == 0:
            return verdict("", NOT_FOUND)
        if not record.began or (ended.code or 0) > 0:  # no test's doing
            raise TreeError(f"fault {fault.id}: pytest ended with {ended.code}:\n{ended.output}")
        last = record.began[-1]
        if ended.code is None:
            return verdict(f"{last} (hung: ended by the limit of {fault.limit} s)")
        return verdict(f"{last} (died of {signal.Signals(-ended.code).name})")

    def _run(
        self, tests: Sequence[str], keyword: str, limit: float, more: Sequence[str]
    ) -> tuple[Ended, _Record]:
        path = self._folder / "record"
        path.unlink(missing_ok=True)
        words = [
            *("-m", "pytest", "-q", "-p", RECORDER, "--record", str(path)),
            # The project's own options may split the tests over processes or leave some out.
            *("-o", "addopts=", "-p", "no:cacheprovider"),
            *("-o", "timeout=0"),  # the fault's own limit says that it hung
            *("--basetemp", str(self._folder / "pytest")),
            *more,
        ]
        words += [*(["-k", keyword] if keyword else []), *tests]
        ended = self._tree.run(words, limit, path)
        record = _Record([], set(), [])
        for line in path.read_text().splitlines() if path.exists() else ():
            event, test = json.loads(line)
            if event == "began":
                record.began.append(test)
            elif event == "passed":
                record.passed.add(test)
            else:
                record.failed.append(test)
        return ended, record


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of the verdicts."""
    lines = ["| fault | in | what would go wrong | found by | s |", "|---|---|---|---|---|"]
    for v in verdicts:
        found = v.problem or f"`{v.found_by}`"
        lines.append(
            f"| {v.fault.id} | `{v.fault.file}` | {v.fault.harm} | {found} | {v.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def as_json(verdicts: Sequence[Verdict]) -> str:
    """The verdicts, with all that the table of faults says."""
    return json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n"
