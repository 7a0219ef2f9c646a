"""Python signatures of the extension (csrc/bindings).

Arrays are C-contiguous and aligned, without copies or casts. T tokens, k experts of each, H hidden
size, I intermediate size, E experts, [N, K] a projection. bf16 goes as the bits of uint16.

An argument of another type raises TypeError everywhere; one of another dtype, shape, length or
range, a name that is unknown, an array that the method needs and that is missing, and a weight that
is not finite raise ValueError with what was found and what was expected. What the system or CUDA
refuses, memory that runs out and a layer without weights raise RuntimeError. ``Raises`` has what
else there is.
"""

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

    Raises:
        ValueError: there is no such table, or it is of an unknown target.
    """

def cpu_features() -> list[tuple[str, bool]]:
    """(name, whether CPU and operating system have it), in a fixed order."""

def cpu_brand() -> str:
    """The CPU's name for itself; empty if it has none."""

def codes_shape(n: int, k: int, method: str) -> list[int]:
    """Shape of one projection's packed codes, [N / 16, K / 8 or K / 4, 64] bytes.

    N and K are multiples of 64 up to 131072, here and wherever a projection is packed.
    """

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
    """The [N, K] weights that a packed projection stands for; single-threaded, releases the GIL.

    Args:
        codes: of ``codes_shape``; int8 as uint8 bits.
        scales: [N], bf16 bits.
        table_index: [N / 16, K / block, 4], the block 16 or 8 k; None for int8.
        tables: [256, 16]; None for int8.
        n: N.
        k: K.
        method: one of ``packed.METHODS``.
    """

def int4_tables(method: str) -> NDArray[np.int8]:
    """The [256, 16] levels that new weights of a method with tables are encoded with."""

class Job:
    """A call of a layer that was queued."""

    def wait(self) -> None:
        """Wait for the end, without the GIL.

        Raises:
            RuntimeError: the call was given up, or what else a worker threw.
        """

class Engine:
    """Workers pinned to ``cpus``, group after group; layers are cut into ``slices``.

    Args:
        cpus: CPU ids of each group's workers, a group for each NUMA node.
        slices: at least as many as groups, at most 1024.
        target: as ``resolve_target`` takes it.
    """

    def __init__(self, cpus: list[list[int]], slices: int, target: str) -> None: ...
    @property
    def target(self) -> str:
        """The target's name."""

    @property
    def cpus(self) -> list[list[int]]:
        """CPU ids of each group's workers."""

    @property
    def totals(self) -> dict[str, int]:
        """Sums over the layer calls that have ended.

        ``calls``, their ``tokens``, the ``experts`` that each of them read, and nanoseconds:
        ``prepare_ns`` until a call is with the workers, ``workers_ns`` until they are through
        with it, without their time for the calls before it.
        """

    def take_buffer(self, bytes: int) -> NDArray[np.uint8]:
        """[bytes] of memory, its contents those of an earlier use.

        It is used again when the array, all that shares its memory and the jobs that write to it
        are gone.
        """

    def take_like(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """Such memory with the dtype and shape of ``array``."""

class ExpertMask:
    """Which of 1 to 65536 experts the GPU has; stays until the last layer that reads it is gone."""

    def __init__(self, num_experts: int) -> None: ...
    @property
    def array(self) -> NDArray[np.bool_]:
        """[num_experts], the memory itself; may be changed between calls."""

class Deferred:
    """The sum of experts that a call has left for the next layer's; not taken, it is dropped."""

class Layer:
    """One layer's experts: E of them, of which a token uses k.

    Args:
        engine: what computes them.
        num_experts: E, at most 65536.
        top_k: k, at most E.
        hidden_size: H, a multiple of 64 up to 131072.
        intermediate_size: I, likewise.
        method: one of ``packed.METHODS``.
        on_gpu: [E] experts that calls leave out; none without it.
    """

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
    ) -> None:
        """Read packed experts from a file, all workers at once; slot s gets expert source[s].

        Args:
            path: of a layer file whose header was checked.
            offsets: [3, 3] bytes from the file's start: of gate, up and down, the codes,
                ``table_index`` (anything for int8) and scales of all experts.
            tables: [256, 16]; None for int8.
            source: [E], -1 for a slot that stays empty.

        Raises:
            ValueError: tables are missing, or source is of another length or names no expert.
            RuntimeError: the file cannot be read, ends too soon, or memory runs out.
        """

    def load_matrices(
        self,
        weights: Sequence[NDArray[np.uint16] | NDArray[np.float32]],
        dtype: str,
        source: list[int],
    ) -> None:
        """Quantise gate and up, [E, I, H], and down, [E, H, I]; slot s gets expert source[s].

        Args:
            weights: the three of them; fp32, or the bits of bf16 or fp16.
            dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
            source: [E], -1 for a slot that stays empty.
        """

    def submit(
        self,
        x: NDArray[np.uint16] | NDArray[np.float32],
        ids: NDArray[np.int32] | NDArray[np.int64],
        weights: NDArray[np.float32],
        out: NDArray[Any],
        deferred: int = 0,
        before: Deferred | None = None,
    ) -> tuple[Job, Deferred | None]:
        """Queue a call; the inputs have been read when this returns.

        Args:
            x: [T, H], fp32 or the bits of bf16.
            ids: [T, k]; -1 is padding.
            weights: [T, k].
            out: as many bytes as x, from ``take_like`` or ``take_buffer``; becomes [T, H] in x's
                dtype. The job holds it, too.
            deferred: of each token's experts, that many of the smallest weights (of equal ones the
                later) are left to the next layer's call instead, but for those that the call
                computes for another token anyway; none where it is 0.
            before: what the layer before has left for a call of T tokens; added to ``out``.

        Returns:
            The job of ``out``, and what is left; None if that is nothing.
        """

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory; 0 before they are loaded."""

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """[num_experts], a copy: how often ids of ended calls named each, on the GPU or here.

        May be read while calls run. Padding and bad ids are not counted.
        """
    @property
    def slices(self) -> list[tuple[int, int, list[list[int]], NDArray[np.uint8]]]:
        """Each NUMA node's part of the weights: the memory itself, which nobody may write to.

        Of each slice: the first and the last but one of its intermediate channels, whose rows of
        gate and up and columns of down it has; where in a slot codes, table index and scales of
        gate, up and down begin, in bytes; and uint8 [num_experts, bytes of a slot], whose layout
        is that of docs/weight-format.md with these channels alone. The array keeps the layer.
        """

class StreamContext:
    """What the layers' calls on CUDA streams share; thread-safe.

    Args:
        library: path of the CUDA runtime, which must be loaded already.

    Raises:
        RuntimeError: it is not loaded, or lacks a call.
    """

    failure: str
    """The first failure of any call, naming its layer; empty if there was none."""

    flags: bool
    """Whether calls that are captured from now on are started and ended by words of pinned memory.

    Otherwise by host functions, which is so until :meth:`use_flags` succeeds. Setting it to True
    before raises RuntimeError.
    """

    def __init__(self, library: str) -> None: ...
    def use_flags(self, driver: str, seconds: float = 5.0, nap: float = 0.01) -> None:
        """Start the thread that watches the words, and replay a graph to prove that they work.

        Legal while a graph is being captured, but better done before.

        Args:
            driver: path or name of the CUDA driver, which must be loaded already.
            seconds: how long a step of the proof may take.
            nap: seconds after which the idle thread looks by itself; the first proof's counts.

        Raises:
            RuntimeError: the driver is not loaded, or what does not work here.
        """

    def register_memory(self, memory: NDArray[np.uint8]) -> None:
        """Let the card read memory by itself, which must stay until it is unregistered.

        Raises:
            ValueError: gaps in the memory.
            RuntimeError: CUDA refuses it, also because a part of it is registered already.
        """

    def unregister_memory(self, memory: NDArray[np.uint8]) -> None:
        """End that; must come before the memory goes, and after the card's copies from it.

        Args:
            memory: as it was registered.

        Raises:
            ValueError: gaps in the memory.
            RuntimeError: none is registered that begins there.
        """

    def pin_outputs(self, engine: Engine) -> None:
        """Let the engine's outputs of 128 KiB or more lie in memory that the card reads by itself.

        Those that are taken from now on, where CUDA registers them; else they stay as they are.
        """

    def end_overdue(self, seconds: float) -> None:
        """Let calls fail that their stream has waited for longer than this, at most a year."""

class StreamLayer:
    """Puts a layer's calls on a CUDA stream; legal inside a capture, and never waits."""

    def __init__(self, context: StreamContext, layer: Layer, layer_idx: int) -> None: ...
    def submit(
        self,
        stream: int,
        x: int,
        dtype: str,
        tokens: int,
        ids: int,
        int64_ids: bool,
        weights: int,
        deferred: int = 0,
        before: StreamLayer | None = None,
    ) -> None:
        """As ``Layer.submit``, but a bad id is left out and becomes the context's ``failure``.

        Args:
            stream: CUDA's handle; 0 is the default stream.
            x: address on the device of [tokens, H].
            dtype: of x and of the output, ``"bf16"`` or ``"fp32"``.
            tokens: T.
            ids: address on the device of [tokens, k].
            int64_ids: whether ids are int64, not int32.
            weights: address on the device of [tokens, k], fp32.
            deferred: as for ``Layer.submit``.
            before: the layer whose last call was submitted with ``deferred``, for as many tokens;
                what it leaves is added to this call's output.

        Raises:
            ValueError: a null address, an unknown dtype, or a number out of range.
            RuntimeError: what CUDA refuses, a submit before it without sync, a call that failed
                earlier, or ``before`` has left nothing.
        """

    def sync(self, stream: int, out: int) -> None:
        """Put the wait for the call, and the copy of its output, on the stream.

        Args:
            stream: as in ``submit``.
            out: address on the device of [tokens, H] in x's dtype; NaN where the call failed.

        Raises:
            ValueError: a null address.
            RuntimeError: what CUDA refuses, or no submit before it.
        """

class Staging:
    """Copies to a device out of memory that it cannot read by itself, through pinned buffers.

    Threads of its own fill the buffers, and end with it. The copies of one are on one stream, or on
    another once the one before is empty.

    Args:
        context: of the CUDA runtime; None to copy within this process, at once.
        cpus: ids of those that the threads may run on, at least one.
        threads: how many, 1 to 64.
        buffers: how many, 1 to 1024, which stay until the process ends.
        buffer_bytes: of each, 1 to 1 GiB.
    """

    def __init__(
        self,
        context: StreamContext | None,
        cpus: list[int],
        threads: int,
        buffers: int,
        buffer_bytes: int,
    ) -> None: ...
    def copy(self, memory: NDArray[np.uint8], to: int, stream: int) -> None:
        """Put a copy on a stream; releases the GIL, and waits only without a context.

        Args:
            memory: which must stay as it is until the stream is through with it.
            to: address on the device of as many bytes.
            stream: CUDA's handle.

        Raises:
            ValueError: gaps in the memory, or a null address.
            RuntimeError: what CUDA refuses; what is there of the copy is then of no use.
        """
