"""Bytes on disk, whatever they hold: foreign ones, safetensors' headers, durable writes, units,
folders, locks."""
