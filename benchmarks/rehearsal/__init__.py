"""What V3.2 will do on this machine, before 689 GB are downloaded.

    python -m benchmarks.rehearsal [--layers auto|N|N,N,N] [--json FILE] [--plot FILE.png]

The whole model needs 340 GB of memory, but its layers are alike: a few MoE layers with every size
real cost a step a few times what one layer costs. So the first N layers, with random weights, are
made in seconds and served by stock SGLang as ``entrypoint.py serve`` starts it, with the tutorial's
settings, for several N; times are fitted by a straight line, t = a + b N, and taken at N = 58. The
line is the model: where N is small, its interval is wide, and is given.

plan.py chooses the N, checkpoint.py and packed_layers.py write files, variant.py starts a server
and measures.py asks it, trace.py takes a step apart, fit.py and answer.py make sentences of it.
"""
