"""From settings to the commands of SGLang and of the conversion."""
