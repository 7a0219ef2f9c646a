"""A checkpoint as it lies on disk: its config, its shards, its number formats, its origin."""
