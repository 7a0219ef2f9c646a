"""A lock whose holder also does what finalizers want done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class LateLock:
    """A lock, and work for which it must be free.

    Python may run a finalizer in any thread and between any two lines, also in the thread that
    holds the lock: it can neither wait for it nor go ahead.

    Args:
        may_now: whether what this thread is at allows such work.
    """

    def __init__(self, may_now: Callable[[], bool]) -> None:
        self._lock = threading.Lock()
        self._late: deque[Callable[[], None]] = deque()
        self._may_now = may_now

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._do_late()

    def when_free(self, work: Callable[[], None]) -> None:
        """Do this with the lock held: at once, or after its holder or the next one is through.

        Args:
            work: must not raise; it may be done in another's call.
        """
        self._late.append(work)
        self._do_late()

    def _do_late(self) -> None:
        # Whoever adds work and finds the lock taken leaves it to the holder, who looks again after
        # the release.
        while self._late and self._may_now() and self._lock.acquire(blocking=False):
            try:
                if self._late:
                    self._late.popleft()()
            finally:
                self._lock.release()
