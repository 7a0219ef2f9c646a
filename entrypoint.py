#!/usr/bin/env python3
"""``python entrypoint.py STAGE``: see ``--help``.

Stages: check, download, convert, serve, smoke, health, status, bundle, unbundle.
"""

from kt_kernel.program import run_program

if __name__ == "__main__":
    run_program("deploy.command_line:main")
