"""Python signatures of the extension (csrc/bindings)."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

def targets() -> list[tuple[str, bool]]:
    """(name, whether this CPU runs it), best first."""

def resolve_target(name: str) -> str:
    """``name``, or the best automatic target for ``""``.

    Raises:
        ValueError: unknown, or not supported by this CPU.
    """

def assume_target_supported(name: str) -> None:
    """For tests that emulate a target's instructions: let it run when it is named."""

def replace_target(address: int) -> None:
    """For tests that compile a target otherwise: run it in place of the built one, when named.

    Args:
        address: of its ``Kernels`` (csrc/targets/kernels.h), in a library that stays loaded.
    """

def cpu_features() -> list[tuple[str, bool]]: ...
def cpu_brand() -> str: ...
def allowed_cpus() -> list[tuple[int, int, int]]:
    """(CPU id, NUMA node, rank among the hyperthreads of its core)."""

def choose_cpus(cpus: list[tuple[int, int, int]], threads: int, pools: int) -> list[list[int]]:
    """CPU ids for ``pools`` groups of workers, ``threads`` in all where there are as many.

    Args:
        cpus: as from ``allowed_cpus``.
    """

def codes_shape(n: int, k: int, method: str) -> list[int]: ...
def quantize_projection(
    weight: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32],
    dtype: str,
    scale_inv: NDArray[np.float32] | None,
    method: str,
    target: str = "",
) -> dict[str, NDArray[Any]]:
    """Pack one projection [N, K] of one expert; single-threaded, releases the GIL.

    Args:
        weight: the checkpoint's bits, C-contiguous.
        dtype: ``"fp8_e4m3"``, ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        scale_inv: for FP8, [ceil(N / 128), ceil(K / 128)].
        method: one of ``packed.METHODS``.
        target: whose instructions to use, ``""`` for the best; the bytes are the same.

    Returns:
        ``codes``, ``scales`` and, for int4, ``table_index``, shaped as in docs/weight-format.md
        without the expert dimension; int8 codes as uint8 bits, bf16 scales as uint16 bits.

    Raises:
        ValueError: a shape that cannot be packed, or a weight that is not finite.
    """

def dequantize_projection(
    codes: NDArray[np.uint8],
    scales: NDArray[np.uint16],
    table_index: NDArray[np.uint8] | None,
    tables: NDArray[np.int8] | None,
    n: int,
    k: int,
    method: str,
) -> NDArray[np.float32]:
    """The [N, K] weights that a packed projection stands for."""

def int4_tables(method: str) -> NDArray[np.int8]:
    """The [256, 16] levels that new int4 weights are encoded with."""

class Job:
    def wait(self) -> None:
        """Wait for the end; raises what a worker threw."""

class Engine:
    """Workers pinned to ``cpus``, group after group; layers are cut into ``slices``."""

    def __init__(self, cpus: list[list[int]], slices: int, target: str) -> None: ...
    @property
    def target(self) -> str: ...
    @property
    def cpus(self) -> list[list[int]]: ...
    @property
    def totals(self) -> dict[str, int]:
        """Sums over the layer calls that have ended.

        ``calls``, their ``tokens``, the ``experts`` that each of them read, and nanoseconds:
        ``prepare_ns`` until a call is with the workers, ``workers_ns`` until they are through.
        """

    def take_buffer(self, bytes: int) -> NDArray[np.uint8]:
        """[bytes] of memory, its contents those of an earlier use.

        It is used again when the array, all that shares its memory and the jobs that write to it
        are gone.
        """

    def take_like(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """Such memory with the dtype and shape of ``array``."""

class ExpertMask:
    """Which experts the GPU has; stays until the last layer that reads it is gone."""

    def __init__(self, num_experts: int) -> None: ...
    @property
    def array(self) -> NDArray[np.bool_]:
        """[num_experts], the memory itself; may be changed between calls."""

class Layer:
    """One layer's experts. Bad arguments of any method raise ValueError, or TypeError."""

    def __init__(
        self,
        engine: Engine,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        method: str,
        on_gpu: ExpertMask | None = None,
    ) -> None: ...
    def load_file(
        self,
        path: str | bytes,
        offsets: list[list[int]],
        tables: NDArray[np.int8] | None,
        source: list[int],
    ) -> None: ...
    def load_matrices(
        self,
        weights: Sequence[NDArray[np.uint16] | NDArray[np.float32]],
        dtype: str,
        source: list[int],
    ) -> None:
        """Quantise gate and up, [E, I, H], and down, [E, H, I]; slot s gets expert source[s].

        Args:
            dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        """

    def submit(
        self,
        x: NDArray[np.uint16] | NDArray[np.float32],
        ids: NDArray[np.int32] | NDArray[np.int64],
        weights: NDArray[np.float32],
        out: NDArray[Any],
    ) -> Job:
        """Queue a call; the inputs have been read when this returns.

        Args:
            x: [T, H], fp32 or the bits of bf16.
            ids: [T, k]; -1 is padding.
            weights: [T, k].
            out: as many bytes as x, from ``take_like`` or ``take_buffer``; becomes [T, H] in x's
                dtype. The job holds it, too.
        """
    @property
    def weight_bytes(self) -> int: ...

class StreamContext:
    """What the layers' calls on CUDA streams share; thread-safe.

    Args:
        library: path of the CUDA runtime, which must be loaded already.

    Raises:
        RuntimeError: it is not loaded, or lacks a call.
    """

    failure: str
    """The first failure of any call, naming its layer; empty if there was none."""

    def __init__(self, library: str) -> None: ...
    def end_overdue(self, seconds: float) -> None:
        """Let calls fail that their stream has waited for longer than this."""

class StreamLayer:
    """Puts a layer's calls on a CUDA stream; legal inside a capture, and never waits.

    With ``deferred``, calls of the experts that the layer defers, which end in the next layer.

    Raises:
        RuntimeError: what CUDA refuses, calls out of order, or a call that failed earlier.
    """

    def __init__(
        self, context: StreamContext, layer: Layer, layer_idx: int, deferred: bool = False
    ) -> None: ...
    def submit(
        self,
        stream: int,
        x: int,
        dtype: str,
        tokens: int,
        ids: int,
        int64_ids: bool,
        weights: int,
    ) -> None:
        """As ``Layer.submit``; x, ids and weights are addresses on the device.

        Args:
            dtype: of x and of the output, ``"bf16"`` or ``"fp32"``.
        """

    def sync(self, stream: int, out: int) -> None:
        """``out`` is an address on the device; NaN where the call failed."""
