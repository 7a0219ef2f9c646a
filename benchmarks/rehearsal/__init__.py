"""What V3.2 will do on this machine, before 689 GB are downloaded.

    python -m benchmarks.rehearsal [--layers auto|N|N,N,N] [--check N] [--json FILE]

The whole model needs 340 GB of memory, but its layers are alike: a few MoE layers with every size
real cost a step a few times what one layer costs. So the first N layers, with random weights, are
made in seconds and served by stock SGLang as ``entrypoint.py serve`` starts it, with the tutorial's
settings, for several N; times are fitted by a straight line, t = a + b N, and taken at N = 58. The
line is the model: where N is small, its interval is wide, and is given. ``--check`` serves one more
N, up to all 58, and says how far the line is off there. The packed layers are one file under all
their names unless ``--own-files`` is given (packed_layers.py says why that measures the same), so
that memory is what limits N; the checkpoint's part for the GPU is 0.3 GB of files for each layer.

plan.py chooses the N, checkpoint.py and packed_layers.py write files, variant.py starts a server
and measures.py asks it, trace.py takes a step apart; fit.py, line_check.py and result.py make
sentences of it.
"""
