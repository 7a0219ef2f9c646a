# For mypy: what the workers, which are run by path, import as ``protocol``.
from benchmarks.workers.protocol import *  # noqa: F403
