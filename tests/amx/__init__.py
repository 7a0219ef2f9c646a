"""AMX kernels on a CPU without AMX: the same machine code, its tile instructions emulated."""
