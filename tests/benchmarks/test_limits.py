"""The compiled probe and what is made of its times."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest

from benchmarks import host_description, limits
from benchmarks.errors import BenchmarkError
from benchmarks.limits import Limits, Measured
from kt_kernel.host.limits import text_of
from tests import compiler


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("probe") / "probe.so"
    limits.compile_probe(path, compiler.warnings())
    return limits._probe(path)


def one_cpu() -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * 1)(host_description.allowed_cpus()[0])


def names(probe: ctypes.CDLL) -> list[str]:
    found: list[str] = []
    while (name := probe.probe_isa_name(len(found))) is not None:
        found.append(name.decode())
    return found


def test_every_instruction_set_runs_or_says_that_it_cannot(probe: ctypes.CDLL) -> None:
    """The loops are assembly: a wrong one would kill the process or count too little."""
    flags = text_of(Path("/proc/cpuinfo"))
    flag = {"avx2": "avx2", "avx512_vnni": "avx512_vnni"}
    flag |= dict.fromkeys(("amx", "amx_loaded"), "amx_int8")
    assert names(probe) == list(flag)
    operations = {"avx2": 12 * 64, "avx512_vnni": 12 * 128}
    operations |= {"amx": 6 * 2 * 16 * 16 * 64, "amx_loaded": 4 * 2 * 16 * 16 * 64}
    for index, name in enumerate(names(probe)):
        times = (ctypes.c_double * 2)()
        found = probe.probe_products(index, one_cpu(), 1, 1000, 2, times)
        if f" {flag[name]} " in flags.replace("\n", " "):
            assert found == 1000 * operations[name]
            assert min(times) > 0
        else:
            assert found == 0


def test_every_pass_of_a_read_is_timed_and_counts_what_it_reads(probe: ctypes.CDLL) -> None:
    seconds = (ctypes.c_double * 5)()
    # Parts are whole huge pages: 7 MiB are read as 6.
    assert probe.probe_read(one_cpu(), 1, 7 << 20, 4, 5, seconds) == 6 << 20
    assert min(seconds) > 0


def test_more_threads_than_cpus_are_refused() -> None:
    count = len(host_description.allowed_cpus())
    with pytest.raises(
        BenchmarkError, match=f"{count + 1} threads asked for: expected 1 to {count}"
    ):
        limits.int8_peaks(count + 1, 0.01)


def test_no_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match=r"install g\+\+"):
        limits.compile_probe(tmp_path / "probe.so")


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BenchmarkError, match="false cannot compile"):
        limits.compile_probe(tmp_path / "probe.so")
    assert list(tmp_path.iterdir()) == []


def test_limits_survive_json_and_know_their_peak() -> None:
    rates = {"avx2": Measured(300.0, 290.0, 0.01), "amx": Measured(4000.0, 3900.0, 0.02)}
    found = Limits(2, Measured.of([30.0, 31.0, 29.0]), rates)
    assert (found.read.best, found.read.median) == (31.0, 30.0)
    assert found.read.spread == pytest.approx(1 / 30)
    assert Limits.from_json(found.to_json()) == found
    assert found.peak == ("amx", 4000.0)
    cores = {"amx": limits.core_rates([7.0, 23.0], [3.0, 1.0], [7.1, 24.0])}
    found = Limits(2, found.read, rates, cores)
    assert Limits.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_samples_go_by_the_state_of_their_core_before_and_after() -> None:
    before, after = [7, 7, 24, 24, 7, 12], [7, 8, 23, 7, 24, 12]
    found = limits.core_rates(before, [3.0, 5.0, 1.0, 9.0, 9.0, 9.0], after)
    assert (found.quiet, found.disturbed) == (Measured.of([3.0, 5.0]), Measured.of([1.0]))
    assert (found.samples, found.quiet_share) == (6, 2 / 6)
    assert limits.core_rates([24.0], [1.0], [24.0]).quiet is None


def test_each_core_is_watched_while_all_work(probe: ctypes.CDLL) -> None:
    """With AMX every time is written; without it the call says so and kills nothing."""
    count = len(host_description.allowed_cpus())
    cpus = (ctypes.c_int * count)(*host_description.allowed_cpus())
    during, before, after = ((ctypes.c_double * (3 * count))() for _ in range(3))
    found = probe.probe_products_watched(3, cpus, count, 1000, 3, 500, during, before, after)
    if probe.probe_isa_supported(3):
        assert found == 1000 * 4 * 2 * 16 * 16 * 64
        assert min(*during, *before, *after) > 0
        assert set(limits.tile_rates(1, 0.01)) == {"amx", "amx_loaded"}
        assert limits.quiet_share(1) in (0.0, 1.0)
    else:
        assert found == 0
        assert limits.tile_rates(1, 0.01) == {}
        assert limits.quiet_share(1) is None
