"""AMX kernels on a CPU without AMX, and how many tile instructions they take."""
