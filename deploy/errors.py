"""Several user errors at once, so that a settings file can be corrected in one go."""

from __future__ import annotations

from collections.abc import Sequence

from kt_kernel.errors import UserError, one_line


class UserErrors(UserError):
    """One or more user errors; :attr:`messages` holds one line each."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = [one_line(message) for message in messages]


def messages_of(error: UserError) -> list[str]:
    """The lines to print for an error, each to be prefixed with ``error: ``."""
    return error.messages if isinstance(error, UserErrors) else [str(error)]
