#!/usr/bin/env python3
"""``python entrypoint.py download|convert|serve|check|smoke|health|status``: see ``--help``."""

from deploy.cli import main
from kt_kernel.program import run_program

if __name__ == "__main__":
    run_program(main)
