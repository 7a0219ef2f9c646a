"""Prompts of many tokens on the card and the CPUs together; see ``card``."""
