"""The error that a benchmark's command ends with."""

from kt_kernel.errors import UserError


class BenchmarkError(Exception):
    """Bad input or a missing prerequisite; its message says what to do."""


#: What code meets that takes a file or an answer for what it should be.
NOT_AS_EXPECTED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
    UserError,
)
