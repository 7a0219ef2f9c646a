"""Checks before serving: each says what was expected, what was found and what to do."""
