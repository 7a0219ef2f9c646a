"""``python -m convert``: a Hugging Face checkpoint's routed experts -> packed INT4/INT8 files.

One module for each step: :mod:`convert.command` reads the flags, :mod:`convert.source` has the
checkpoint and its number formats, :mod:`convert.preflight` checks all before the first byte is
written, :mod:`convert.output` locks the output directory and finds out what is already done,
:mod:`convert.pipeline` runs layer after layer, :mod:`convert.quantize` does one projection of one
expert, :mod:`convert.writer` writes the file aside, :mod:`convert.read_back` compares it with the
source, and :mod:`convert.manifest` records it (:mod:`convert.manifest_file` reads that again).
"""
