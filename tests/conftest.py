"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_kernel import _ext, packed
from tests.csrc import portable_isa
from tests.csrc.amx import tile_unit
from tests.docker import engine as docker_engine


def cpus_of_process(cpus: Sequence[int], index: int, count: int) -> Sequence[int]:
    """The CPUs of one of ``count`` processes that run tests: at least two, else apart."""
    share = max(2, len(cpus) // count)
    begin = index * share % len(cpus)
    return [*cpus, *cpus][begin : begin + share]


if "PYTEST_XDIST_WORKER" in os.environ:
    # Engines pin a thread to each CPU that the process has; all processes' would be the same ones.
    os.sched_setaffinity(
        0,
        cpus_of_process(
            sorted(os.sched_getaffinity(0)),
            int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")),
            int(os.environ["PYTEST_XDIST_WORKER_COUNT"]),
        ),
    )

# Engines of tests are no servers; those of other processes would be in their way.
_LOCKS = tempfile.TemporaryDirectory(prefix="kt-cpu-locks-")
os.environ["KT_CPU_LOCKS"] = _LOCKS.name


@pytest.fixture(autouse=True)
def no_own_key_stays() -> Iterator[None]:
    """A server leaves its key for itself in the environment, where no other program expects it."""
    yield
    os.environ.pop("KT_SERVER_OWN_KEY", None)


#: Targets that this CPU runs as they are built.
NATIVE = [name for name, supported in _ext.targets() if supported]

#: Targets that stand-ins run in this process, and how.
STOOD_IN = {}
if tile_unit.IS_EMULATED:
    STOOD_IN["amx"] = "amx is emulated"
elif tile_unit.IS_PORTABLE:
    how = "amx and avx512_vnni are compiled with portable intrinsics"
    STOOD_IN = dict.fromkeys(portable_isa.TARGETS, how)

SUPPORTED = [name for name, _ in _ext.targets() if name in NATIVE or name in STOOD_IN]
#: Targets with int8 activations; they must agree to the bit.
INTEGER_TARGETS = [name for name in SUPPORTED if name != "reference"]


#: Files whose tests share the stack of tests/docker/conftest.py.
ONE_STACK = [
    f"tests/docker/test_{name}.py" for name in ("monitoring", "serving", "serving_replicas")
]

MEASURED: list[str] = []
"""Lines that tests want to see in the terminal summary."""


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of several that pytest-xdist started for a test run."""
    return hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    # Not on import: pytest's own handler for SIGILL is set after that.
    tile_unit.install()
    if not is_worker(session.config):
        stack = ExitStack()
        stack.enter_context(docker_engine.run_of_tests())
        session.config.add_cleanup(stack.close)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    if is_worker(config):
        config.workeroutput["measured"] = MEASURED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    MEASURED.extend(getattr(node, "workeroutput", {}).get("measured", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("measured")
        for line in MEASURED:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def measured() -> list[str]:
    """Lines for the terminal summary."""
    return MEASURED


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_once(name, make) is the path ``name`` that make(path) made once for all processes.

    What is there must never be changed.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "made-once"

    def path_of(name: str, make: Callable[[Path], object]) -> Path:
        # Here, since what runs without a network and packages needs no such thing.
        from filelock import FileLock

        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = path.with_name(f"{path.name}.partial")
                make(partial)
                partial.rename(path)
        return path

    return path_of


def pytest_report_header() -> str:
    notes = [f"kernel targets under test: {' '.join(SUPPORTED)}", *sorted(set(STOOD_IN.values()))]
    missing = [name for name, _ in _ext.targets() if name not in SUPPORTED]
    if missing:
        notes.append(f"this CPU cannot run {' '.join(missing)}")
    if tile_unit.ABSENT:
        notes.append(f"testing them with portable intrinsics {portable_isa.NEEDS}")
    return "; ".join(notes)


def scope_of(nodeid: str) -> str:
    """Tests of one scope run in one process, where several run."""
    file = nodeid.partition("::")[0]
    if file in ONE_STACK:
        return "stack"
    # Each of these starts a server of its own; else a file's tests share what its fixtures make.
    return nodeid if file.startswith("tests/serve/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    # --dist loadgroup of pytest-xdist 3.8 forgets the groups with pytest 9.2.
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):  # type: ignore[misc]  # the package is not typed
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ByScope(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes longest begins first.
    items.sort(key=lambda i: not (i.get_closest_marker("serve") or scope_of(i.nodeid) == "stack"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=INTEGER_TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each integer target that this CPU runs or stand-ins run, forced by KT_TARGET."""
    name: str = request.param
    monkeypatch.setenv("KT_TARGET", name)
    return name


@pytest.fixture(params=packed.METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each quantisation method."""
    name: str = request.param
    return name
