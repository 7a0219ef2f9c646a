"""What the tests on the stand-in for the CUDA runtime share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.csrc.stream import fake_cuda
from tests.csrc.stream.fake_cuda import Stream


@pytest.fixture
def stream() -> Iterator[Stream]:
    """A stream; what a test has told the stand-in to do wrong or late ends with it."""
    stream = Stream()
    yield stream
    library = fake_cuda.library()
    library.fake_break_memory_ops(0)
    stream.release()
    stream.synchronize()
    library.fake_set_delay(0)
    library.fake_fail_next(0)
    stream.close()
