"""The error a user can act on."""


class UserError(Exception):
    """A mistake in the input or the set-up, not in the program.

    The message is one line: what is wrong, where, what was expected, what to do.
    Command lines print it as ``error: <message>`` on stderr and exit with code 2.
    """
