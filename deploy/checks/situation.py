"""What a check looks at, and how one is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.checks.result import Finding, Result
from kt_kernel.host.machine import Machine
from kt_kernel.host.memory import Memory, read_memory

if TYPE_CHECKING:
    from deploy.checks.needs import Needs


@dataclass(frozen=True)
class Situation:
    """What the checks look at.

    Attributes:
        values: the settings with every ``auto`` replaced.
        environment: variables that the server would get.
        machine: facts about this machine.
        root: where /proc, /sys and /dev are looked for.
        serving: a server of these settings runs here, and has the card.
    """

    values: Mapping[str, Any]
    environment: Mapping[str, str]
    machine: Machine
    root: Path = Path("/")
    serving: bool = False

    @cached_property
    def needs(self) -> Needs:
        """Sizes of the model."""
        # It loads numpy, which `serve --print` does without.
        from deploy.checks.needs import model_needs

        return model_needs(self.model_path)

    @cached_property
    def memory(self) -> Memory:
        """Main memory of this machine."""
        return read_memory(self.root)

    @property
    def is_small(self) -> bool:
        """Whether the model is so small that speed does not matter: a demo's, a test's."""
        return self.needs.is_small

    @property
    def model_path(self) -> Path:
        return Path(self.values["KT_MODEL_PATH"])

    @property
    def weight_path(self) -> Path:
        return Path(self.values["KT_WEIGHT_PATH"])


@dataclass(frozen=True)
class Check:
    """A check and when it runs.

    Attributes:
        name: as reports show it and as ``KT_IGNORE_CHECKS`` takes it.
        look: finds nothing, where it does not apply, one thing or several.
        serve: ``serve`` runs it before it starts.
        sized: it compares with the model's size; before serving, that of a model that is not there
            is not guessed.
        host: it looks at the machine only and needs no model (``check --host``).
    """

    name: str
    look: Callable[[Situation], Iterator[Finding]]
    serve: bool
    sized: bool
    host: bool

    def __call__(self, situation: Situation) -> Iterator[Result]:
        for finding in self.look(situation):
            yield Result(check=self.name, **vars(finding))


def check(
    name: str, *, serve: bool = True, sized: bool = False, host: bool = True
) -> Callable[[Callable[[Situation], Iterator[Finding]]], Check]:
    """Makes a :class:`Check` of a function; a check belongs to the report by being in a module of
    :mod:`deploy.checks.registry`."""
    return lambda look: Check(name, look, serve, sized, host)
