"""Settings: the one table, its types, env files, and the documents generated from it."""
