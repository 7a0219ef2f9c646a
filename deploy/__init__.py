"""The stages behind ``entrypoint.py``: download, convert, serve, check and smoke.

``settings.py`` is the one table of settings; the command lines, ``--help``,
``docs/configuration.md``, ``.env.example`` and ``env/tutorial.env`` all follow from it.
"""
