"""The error a user can act on."""

from __future__ import annotations

import re

#: A longer message is cut in its middle: a name out of a damaged file may have megabytes.
_LONGEST = 2000
#: User and password of an address. Up to the last @ of the word: a password may hold what ends it
#: elsewhere.
_CREDENTIALS = re.compile(r"(?<=://)\S+@")
#: What a secret looks like where it is shown.
MASK = "***"


class UserError(Exception):
    """A mistake in the input or the set-up, not in the program.

    The message is one line: what is wrong, where, what was expected, what to do.
    Command lines print it as ``error: <message>`` on stderr and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text that a terminal shows on one line, and that any UTF-8 stream can write.

    Names come from files and file systems: control characters and what is no Unicode are shown as
    escapes. Passwords in addresses are masked.
    """
    text = without_passwords(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def without_passwords(text: str) -> str:
    """A text with user and password of the addresses in it masked."""
    return _CREDENTIALS.sub(f"{MASK}@", text)


def describe(error: OSError) -> str:
    """What an error of the operating system says, with the file that it is about."""
    reason = error.strerror or str(error)
    return one_line(f"{error.filename}: {reason}" if error.filename is not None else reason)
