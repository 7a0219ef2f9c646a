"""The machine's measured limits: read bandwidth and int8 peak.

    python -m benchmarks.limits [--threads N] [--json FILE]

Every other number of the benchmarks is given as a share of these, measured in the same run. The
read bandwidth is that of pinned threads passing many times over a buffer that no cache holds; the
int8 peak is that of register-only loops of each instruction set's product: VPMADDUBSW with VPMADDWD
(AVX2), VPDPBUSD (AVX-512 VNNI), TDPBSSD (AMX). Both are written in C++ (``probe.cpp``), compiled on
first use into ``.cache/benchmarks``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import stats
from benchmarks.errors import BenchmarkError
from benchmarks.host_description import allowed_cpus, last_level_cache_bytes
from kt_kernel.files.units import gigabytes

SOURCE = Path(__file__).with_name("probe.cpp")
CACHE = Path(__file__).parents[2] / ".cache" / "benchmarks"

_MIN_BUFFER = 1 << 30
_CACHES_TO_EXCEED = 6  # times the last-level cache: what stays cached of it is then little
#: Nanoseconds of a tile load and a tile product: 7.0 on a quiet core; 22 to 25 where the core's
#: other hyperthread works for somebody else.
QUIET_NS, DISTURBED_NS = 8.5, 15.0
_WATCH_ROUNDS, _WATCH_PRODUCTS = 20_000, 4  # half a millisecond; products of a round
_WATCHED = ("amx", "amx_loaded")
_STREAMS = (1, 2, 4)  # sequential streams of each thread; which is fastest differs by machine


@dataclass(frozen=True)
class Measured:
    """A rate measured many times: its best, its median and the spread (see ``stats.spread``)."""

    best: float
    median: float
    spread: float

    @classmethod
    def of(cls, rates: list[float]) -> Measured:
        return cls(max(rates), stats.median(rates), stats.spread(rates))


@dataclass(frozen=True)
class CoreRates:
    """GOP/s of single cores in a call of all threads, by the state that they were in.

    ``quiet`` and ``disturbed`` are of samples between two probes that both said so, None without
    any; ``samples`` is the number of all, ``quiet_share`` the share of quiet ones.
    """

    quiet: Measured | None
    disturbed: Measured | None
    samples: int
    quiet_share: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CoreRates:
        states = {name: data[name] and Measured(**data[name]) for name in ("quiet", "disturbed")}
        return cls(**{**data, **states})


@dataclass(frozen=True)
class Limits:
    """Limits with ``threads`` pinned threads: reads in GB/s, int8 in GOP/s by instruction set.

    ``cores`` has the tile instructions' rates of single cores; it is empty without AMX, and in
    older results.
    """

    threads: int
    read: Measured
    int8: dict[str, Measured]
    cores: dict[str, CoreRates] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Limits:
        int8 = {name: Measured(**rate) for name, rate in data["int8"].items()}
        cores = {name: CoreRates.from_json(r) for name, r in data.get("cores", {}).items()}
        return cls(data["threads"], Measured(**data["read"]), int8, cores)

    @property
    def peak(self) -> tuple[str, float]:
        """The fastest instruction set and its best GOP/s."""
        name = max(self.int8, key=lambda isa: self.int8[isa].best)
        return name, self.int8[name].best


def probe_name() -> str:
    """File name of the compiled probe: another one for each state of its source."""
    return f"probe-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"


def compile_probe(output: Path, options: Sequence[str] = ()) -> None:
    """Compile ``probe.cpp`` into the shared library ``output``; ``options`` are more of them.

    Raises:
        BenchmarkError: no C++ compiler, or it refused the source.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise BenchmarkError(
            "no C++ compiler found to build the limits' probe: install g++, or pass "
            "--baselines-dir with a folder made by 'python -m benchmarks.baselines prepare', which "
            "holds it built"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        built = Path(folder) / output.name
        # The C++ runtime inside, so that the library runs on machines other than this one.
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", "-static-libstdc++"]
        command = [compiler, *flags, *options, "-static-libgcc", "-o", str(built), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkError(f"{compiler} cannot compile {SOURCE.name}:\n{done.stderr}")
        built.rename(output)


@functools.cache
def _probe(prebuilt: Path | None) -> ctypes.CDLL:
    """The compiled probe: ``prebuilt`` if given, else the cached one, compiled if need be."""
    path = prebuilt
    if path is None:
        path = CACHE / probe_name()
        if not path.exists():
            compile_probe(path)
    library = ctypes.CDLL(str(path))
    library.probe_isa_name.restype = ctypes.c_char_p
    library.probe_read.restype = ctypes.c_int64
    library.probe_read.argtypes = [
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_double),
    ]
    library.probe_products.restype = ctypes.c_double
    library.probe_products.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_double),
    ]
    times = ctypes.POINTER(ctypes.c_double)
    library.probe_products_watched.restype = ctypes.c_double
    library.probe_products_watched.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int64,
        *(times, times, times),
    ]
    return library


def _cpus(threads: int) -> Any:
    cpus = allowed_cpus()
    if not 1 <= threads <= len(cpus):
        raise BenchmarkError(
            f"{threads} threads asked for: expected 1 to {len(cpus)}, the CPUs this process may use"
        )
    return (ctypes.c_int * threads)(*cpus[:threads])


def _pinned(result: float, threads: int) -> float:
    if result < 0:
        raise BenchmarkError(f"cannot pin {threads} threads: the process's CPU set changed")
    return result


def read_bandwidth(threads: int, seconds: float, prebuilt: Path | None = None) -> Measured:
    """GB/s of reading memory with ``threads`` pinned threads, for about ``seconds``.

    The number of streams with the best median is measured; its passes are what is returned.

    Raises:
        BenchmarkError: more threads than CPUs, or too little memory for the buffer.
    """
    probe, cpus = _probe(prebuilt), _cpus(threads)
    size = max(_MIN_BUFFER, _CACHES_TO_EXCEED * last_level_cache_bytes())

    def rates(streams: int, passes: int) -> list[float]:
        times = (ctypes.c_double * passes)()
        found = _pinned(probe.probe_read(cpus, threads, size, streams, passes, times), threads)
        if not found:
            raise BenchmarkError(
                f"cannot read a buffer of {gigabytes(size)}: expected that much free memory and "
                "a CPU with AVX2"
            )
        return [found / t / 1e9 for t in times]

    tried = {streams: rates(streams, 4) for streams in _STREAMS}
    streams = max(tried, key=lambda s: stats.median(tried[s]))
    passes = max(8, int(seconds * stats.median(tried[streams]) * 1e9 / size))
    return Measured.of(rates(streams, passes))


def _instruction_sets(probe: ctypes.CDLL) -> Iterator[tuple[int, str]]:
    """The probe's number and name of each instruction set that runs here."""
    index = 0
    while (name := probe.probe_isa_name(index)) is not None:
        if probe.probe_isa_supported(index):
            yield index, name.decode()
        index += 1


def int8_peaks(threads: int, seconds: float, prebuilt: Path | None = None) -> dict[str, Measured]:
    """GOP/s of int8 products of every instruction set that runs here, about ``seconds`` for each.

    A product and its addition are two operations.

    Raises:
        BenchmarkError: more threads than CPUs.
    """
    probe, cpus = _probe(prebuilt), _cpus(threads)
    peaks: dict[str, Measured] = {}
    for index, name in _instruction_sets(probe):
        repeats = 10
        times = (ctypes.c_double * repeats)()
        probe.probe_products(index, cpus, threads, 100_000, repeats, times)  # warm up, size
        rounds = max(1000, int(100_000 * seconds / repeats / min(times)))
        found = probe.probe_products(index, cpus, threads, rounds, repeats, times)
        operations = _pinned(found, threads)
        peaks[name] = Measured.of([operations / t / 1e9 for t in times])
    return peaks


def core_rates(
    before: Sequence[float], rates: Sequence[float], after: Sequence[float]
) -> CoreRates:
    """Samples by state; ``before`` and ``after`` each, nanoseconds of a load and a product.

    A core that changed meanwhile, or was in neither state, counts in neither.
    """
    samples = list(zip(before, rates, after, strict=True))
    quiet = [rate for b, rate, a in samples if max(a, b) < QUIET_NS]
    disturbed = [rate for b, rate, a in samples if min(a, b) > DISTURBED_NS]
    return CoreRates(
        Measured.of(quiet) if quiet else None,
        Measured.of(disturbed) if disturbed else None,
        len(samples),
        len(quiet) / len(samples),
    )


def _watched(
    probe: ctypes.CDLL, isa: int, cpus: Any, rounds: int, repeats: int
) -> tuple[float, Any, Any, Any]:
    """Operations of a repeat of one thread, and the seconds of each: during, before and after."""
    during, before, after = ((ctypes.c_double * (repeats * len(cpus)))() for _ in range(3))
    operations = probe.probe_products_watched(
        isa, cpus, len(cpus), rounds, repeats, _WATCH_ROUNDS, during, before, after
    )
    return _pinned(operations, len(cpus)), during, before, after


def tile_rates(threads: int, seconds: float, prebuilt: Path | None = None) -> dict[str, CoreRates]:
    """What single cores make of tile instructions while all ``threads`` do, by their state.

    Empty without AMX. A virtual machine's CPUs move over the hyperthreads of its host, so each
    sample stands between two probes of its core.

    Raises:
        BenchmarkError: more threads than CPUs.
    """
    probe, cpus = _probe(prebuilt), _cpus(threads)
    found: dict[str, CoreRates] = {}
    for index, name in _instruction_sets(probe):
        if name in _WATCHED:
            repeats = max(2, int(seconds / 2e-3))
            operations, during, before, after = _watched(probe, index, cpus, _WATCH_ROUNDS, repeats)
            to_ns = 1e9 / (_WATCH_ROUNDS * _WATCH_PRODUCTS)
            found[name] = core_rates(
                [t * to_ns for t in before],
                [operations / t / 1e9 for t in during],
                [t * to_ns for t in after],
            )
    return found


def quiet_share(threads: int, prebuilt: Path | None = None) -> float | None:
    """Share of the cores whose other hyperthread does nothing now, from 0 to 1; None without AMX.

    Takes a millisecond.

    Raises:
        BenchmarkError: more threads than CPUs.
    """
    probe, cpus = _probe(prebuilt), _cpus(threads)
    isas = {name: index for index, name in _instruction_sets(probe)}
    if _WATCHED[-1] not in isas:
        return None
    _, _, before, after = _watched(probe, isas[_WATCHED[-1]], cpus, 0, 1)
    quiet_seconds = QUIET_NS * _WATCH_ROUNDS * _WATCH_PRODUCTS / 1e9
    quiet: list[bool] = [max(pair) < quiet_seconds for pair in zip(before, after, strict=True)]
    return sum(quiet) / threads


def measure(threads: int, seconds: float = 2.0, prebuilt: Path | None = None) -> Limits:
    """Both limits with ``threads`` threads; ``seconds`` for reads, a quarter for each peak."""
    read = read_bandwidth(threads, seconds, prebuilt)
    peaks = int8_peaks(threads, seconds / 4, prebuilt)
    return Limits(threads, read, peaks, tile_rates(threads, seconds / 4, prebuilt))
