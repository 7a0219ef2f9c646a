"""A tiny random checkpoint in DeepSeek V3.2's format, its tokenizer, and a Hub to serve it."""
