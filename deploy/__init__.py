"""The stages behind ``entrypoint.py``.

``settings/table.py`` is the one table of settings; the command lines, ``--help``,
``docs/configuration.md``, ``.env.example`` and ``env/tutorial.env`` all follow from it.
"""
