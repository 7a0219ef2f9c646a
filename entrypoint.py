#!/usr/bin/env python3
"""``python entrypoint.py download|convert|serve|check|smoke|health|status``: see ``--help``."""

import sys

from deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
