"""Streams that work on threads of their own, late and at their own pace, as those of a card."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

_LONGEST_DELAY = 2e-3


class ThreadStream:
    """In order, some time later; what is not waited for is likely not to have happened.

    Args:
        seed: of the delays before each piece of work.
    """

    def __init__(self, seed: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._random = random.Random(seed)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        while (work := self._work.get()) is not None:
            time.sleep(self._random.choice((0, 0, _LONGEST_DELAY)))
            try:
                work()
            except BaseException as error:  # as a card does, it goes on; ``finish`` tells
                self._error = self._error or error

    def run(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def mark(self, timed: bool = False) -> threading.Event:
        reached = threading.Event()
        self._work.put(reached.set)
        return reached

    def wait(self, mark: threading.Event) -> None:
        self._work.put(mark.wait)

    def seconds(self, begin: threading.Event, end: threading.Event) -> float | None:
        return 1e-3 if end.is_set() else None

    def hand_over(self) -> None:
        self.finish()

    def finish(self) -> None:
        self.mark().wait()
        if self._error is not None:
            raise self._error

    def may_finish(self) -> bool:
        return True

    def end(self) -> None:
        self._work.put(None)
        self._thread.join()
