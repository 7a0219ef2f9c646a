"""What this machine has and grants this process: CPUs, memory, GPUs, limits.

``root`` is where ``/proc``, ``/sys`` and ``/dev`` are, for tests.
"""
