"""The CUDA runtime's stand-in (``fake_runtime.cpp``) and device arrays in its memory."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from tests import shared_library

SOURCE = Path(__file__).with_name("fake_runtime.cpp")


@functools.cache
def library() -> ctypes.CDLL:
    lib = shared_library.load("fake-cudart", [SOURCE], ["-O1", "-g"], [])
    for name in ("fake_malloc", "fake_stream", "fake_end_capture"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.fake_registered.restype = ctypes.c_size_t
    return lib


class Array:
    """A NumPy array's worth of device memory; never freed."""

    def __init__(self, values: np.ndarray) -> None:
        self.shape, self.dtype = values.shape, values.dtype
        self.address = library().fake_malloc(ctypes.c_size_t(values.nbytes))
        assert self.address
        self.numpy()[...] = values

    def numpy(self) -> np.ndarray:
        """The memory itself."""
        count = int(np.prod(self.shape))
        raw = (ctypes.c_uint8 * (count * self.dtype.itemsize)).from_address(self.address)
        return np.asarray(raw).view(self.dtype).reshape(self.shape)


class Stream:
    """A stream; ``handle`` is what the runtime calls it."""

    def __init__(self) -> None:
        self.handle: int = library().fake_stream()
        self._pointer = ctypes.c_void_p(self.handle)

    def synchronize(self) -> None:
        library().fake_synchronize(self._pointer)

    def copy(self, to: Array, values: np.ndarray | Array) -> None:
        """Set device memory, in the stream's order; ``values`` must stay until then."""
        source = values.address if isinstance(values, Array) else values.ctypes.data
        library().fake_copy(
            self._pointer,
            ctypes.c_void_p(to.address),
            ctypes.c_void_p(source),
            ctypes.c_size_t(to.numpy().nbytes),
        )

    def fill(self, to: Array, byte: int) -> None:
        library().fake_fill(
            self._pointer, ctypes.c_void_p(to.address), byte, ctypes.c_size_t(to.numpy().nbytes)
        )

    def hold(self) -> None:
        """Let nothing after this run until ``release``."""
        library().fake_hold(self._pointer)

    def release(self) -> None:
        library().fake_release()

    def begin_capture(self) -> None:
        library().fake_begin_capture(self._pointer)

    def end_capture(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(library().fake_end_capture(self._pointer))

    def launch(self, graph: ctypes.c_void_p) -> None:
        library().fake_launch(self._pointer, graph)

    def close(self) -> None:
        library().fake_destroy(self._pointer)
