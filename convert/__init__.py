"""``python -m convert``: a Hugging Face checkpoint's routed experts -> packed INT4/INT8 files.

The way of the data, one module each: :mod:`convert.cli` reads the flags, :mod:`convert.checkpoint`
opens the source, :mod:`convert.preflight` checks all of it before the first byte is written,
:mod:`convert.output` locks the output directory and finds out what is already done,
:mod:`convert.pipeline` runs layer after layer, :mod:`convert.quantize` does one projection of one
expert, :mod:`convert.writer` writes the file aside, :mod:`convert.verify` proves it, and
:mod:`convert.manifest` records it (and :mod:`convert.manifest_file` reads that again).
"""
