"""One script for each engine, run by path in a process of its own; see ``protocol``."""
