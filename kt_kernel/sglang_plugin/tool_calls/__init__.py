"""DeepSeek V3.2's tool calls: one grammar for whole answers and for streams."""
