"""The table of faults: what each one is, and whether it still fits the tree."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("faults.toml")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        id: short name.
        file: path in the repository.
        old: text of the file, which occurs exactly once.
        new: what stands there instead.
        harm: what would go wrong for a user.
        tests: files, folders or tests, as pytest takes them, that ought to find it.
        keyword: pytest's ``-k``.
        limit: seconds after which a test counts as hanging.
    """

    id: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]
    keyword: str = ""
    limit: int = 600

    def problem(self, root: Path) -> str:
        """Why the fault does not fit the files of ``root``; empty if it does."""
        try:
            count = (root / self.file).read_text().count(self.old)
        except OSError as error:
            return f"fault {self.id}: cannot read {self.file}: {error.strerror}"
        if count != 1:
            return (
                f"fault {self.id}: its old text occurs {count} times in {self.file}, expected "
                f"once: mend its entry in {TABLE.name}"
            )
        missing = [test for test in self.tests if not (root / test.partition("::")[0]).exists()]
        if missing:
            return f"fault {self.id}: its tests {missing[0]} do not exist: name others"
        return ""


def read_table(path: Path = TABLE) -> list[Fault]:
    """The faults of a table.

    Raises:
        ValueError: an entry lacks a key, has an unknown one, changes nothing, or its id is taken.
    """
    faults: list[Fault] = []
    for entry in tomllib.loads(path.read_text())["fault"]:
        try:
            fault = Fault(**{**entry, "tests": tuple(entry["tests"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: fault {entry.get('id')}: {error}") from None
        if fault.old == fault.new or fault.id in {other.id for other in faults}:
            raise ValueError(f"{path}: fault {fault.id} changes nothing or its id is taken")
        faults.append(fault)
    return faults
