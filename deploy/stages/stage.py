"""What a stage says about itself."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deploy.settings.config import Config


def _adds_nothing(_: ArgumentParser) -> None:
    """No arguments besides those of every stage."""


def _is_in_turn(args: Namespace) -> bool:
    """Whether it is one of those that containers start at once."""
    return getattr(args, "in_turn", None) is not None


@dataclass(frozen=True)
class Stage:
    """A command of ``entrypoint.py``.

    Attributes:
        name: the word on the command line, in the ``stages`` of the settings that it reads, and
            of its state file.
        help: what it does, to follow the name.
        run: does it, with the settings, the arguments and the ``StageState``, which is None where
            none is kept; returns the exit status.
        add_arguments: gives its parser its own arguments.
        problem: what is wrong with a combination of arguments; empty if nothing is.
        acts: whether it reads or writes what its settings name.
        keeps_state: whether it tells ``health`` and ``status`` what it does.
        writes_log: whether its lines begin with the time, unless on a terminal.
        failed: exit status after a :class:`UserError`.
        any_settings: it runs with wrong settings, too: with their defaults, and warnings.
    """

    name: str
    help: str
    run: Callable[[Config, Namespace, Any], int]
    add_arguments: Callable[[ArgumentParser], None] = _adds_nothing
    problem: Callable[[Namespace], str] = lambda _: ""
    acts: Callable[[Namespace], bool] = lambda _: True
    keeps_state: Callable[[Namespace], bool] = lambda _: False
    writes_log: Callable[[Namespace], bool] = lambda args: (
        getattr(args, "in_turn", None) is not None
    )
    failed: int = 2
    any_settings: bool = False
