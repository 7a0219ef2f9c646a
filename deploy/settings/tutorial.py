"""Sizes of the tutorial's launch command, which ``auto`` falls back on."""

REQUESTS = 32
CHUNK = 4096
EXPERTS = 1
TOKENS = 40000
