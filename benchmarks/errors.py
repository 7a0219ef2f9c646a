"""The error that a benchmark's command ends with."""


class BenchmarkError(Exception):
    """Bad input or a missing prerequisite; its message says what to do."""
