"""The stages of ``entrypoint.py``, a module each."""
