"""What a row of the settings table says (:mod:`deploy.settings.table` is the table)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.settings.value_types import ValueType

PREFIX = "KT_"
#: Words that some settings take instead of a value.
AUTO = "auto"
NONE = "none"

SHARED = "Shared by the stages"
DOWNLOAD = "Download"
CONVERT = "Convert"
SERVE = "Serve: the tutorial's launch command"
ADDED = "Serve: what this project adds"
SMOKE = "Smoke"
STATUS = "Status"
KERNEL = "Kernel"
FOREIGN = "Read by other programs"
SECTIONS = (SHARED, DOWNLOAD, CONVERT, SERVE, ADDED, SMOKE, STATUS, KERNEL, FOREIGN)


@dataclass(frozen=True)
class Flag:
    """The flag that a setting becomes in the command of one stage.

    Attributes:
        stage: ``serve`` (SGLang's parser reads it) or ``convert``.
        name: spelling in the command.
        aliases: other spellings that the parser knows.
        position: order in the command; equal positions keep the table's order.
        inverted: a flag without value, given when the setting is false.
    """

    stage: str
    name: str
    aliases: tuple[str, ...] = ()
    position: int = 0
    inverted: bool = False


def served(name: str, *aliases: str, inverted: bool = False) -> tuple[Flag, ...]:
    """The flag of a setting that becomes one in the server's command only."""
    return (Flag("serve", name, aliases, inverted=inverted),)


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        name: environment variable.
        type: how its text becomes a value.
        default: text of the default; empty if there is none.
        help: one sentence or two, for people.
        section: heading in the docs.
        stages: stages that read it.
        flags: what it becomes in the stages' commands.
        tutorial: its text in ``env/tutorial.env``; None leaves the default.
        auto: the word ``auto`` is allowed: chosen by what the machine or the model is.
        none: the word ``none`` is allowed: the flag is left out.
        secret: never printed, and ``<name>_FILE`` may name a file that holds it.
        private: may hold a secret, such as a password in an address: shown masked, or not at all.
        by_name: other programs read the variable itself, not a flag made from it.
        adds: the flag that this project adds to the tutorial's command, as text.
        reason: why ``adds`` is needed.
        turn_off: the assignment that leaves ``adds`` out.
        instead_of: flags of SGLang that it takes the place of; ``KT_EXTRA_ARGS`` may not give them.
    """

    name: str
    type: ValueType
    default: str
    help: str
    section: str
    stages: tuple[str, ...]
    flags: tuple[Flag, ...] = ()
    tutorial: str | None = None
    auto: bool = False
    none: bool = False
    secret: bool = False
    private: bool = False
    by_name: bool = False
    adds: str = ""
    reason: str = ""
    turn_off: str = ""
    instead_of: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Variable that names a file holding the value of a secret."""
        return f"{self.name}_FILE"

    @property
    def expected(self) -> str:
        """What a valid value is, in words."""
        words = [self.type.expected]
        words += [AUTO] if self.auto else []
        words += [NONE] if self.none else []
        return " or ".join(words)

    def parse(self, text: str) -> Any:
        """The value of ``text``: None for ``none``, the string ``auto`` for ``auto``.

        Raises:
            ValueError: not a valid value.
        """
        if self.auto and text.lower() == AUTO:
            return AUTO
        if self.none and text.lower() == NONE:
            return None
        return self.type.parse(text)

    def flag(self, stage: str) -> Flag | None:
        """The flag it becomes in the command of ``stage``."""
        return next((flag for flag in self.flags if flag.stage == stage), None)
