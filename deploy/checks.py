"""Checks before serving: each says what was expected, what was found and what to do.

``serve`` runs the checks marked for it and refuses to start on a FAIL; ``check`` runs them all and
prints a report. A check is a function from :class:`Situation` to results; :func:`all_checks`
lists them in the order of the report.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.by_card import gpus_used
from deploy.limits import Memory, read_memory
from deploy.machine import Machine
from kt_kernel.host import cpus_beside_experts

if TYPE_CHECKING:
    from deploy.needs import Needs

SGLANG_VERSION = "0.5.23"


class Status(StrEnum):
    """How a check ended."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        check: name of the check.
        expected: what is needed, to follow the word "expected".
        found: what is there, to follow the word "found".
        todo: what to do about it; empty for a PASS.
    """

    check: str
    status: Status
    expected: str
    found: str
    todo: str = ""

    def sentence(self) -> str:
        """One line without the status."""
        text = f"{self.check}: expected {self.expected}, found {self.found}"
        return f"{text}: {self.todo}" if self.todo else text


@dataclass(frozen=True)
class Situation:
    """What the checks look at.

    Attributes:
        values: the settings with every ``auto`` replaced.
        environment: variables that the server would get.
        machine: facts about this machine.
        root: where /proc, /sys and /dev are looked for.
    """

    values: Mapping[str, Any]
    environment: Mapping[str, str]
    machine: Machine
    root: Path = Path("/")

    @cached_property
    def needs(self) -> Needs:
        """Sizes of the model."""
        from deploy.needs import model_needs  # loads numpy, which `serve --print` does without

        return model_needs(self.model_path)

    @cached_property
    def memory(self) -> Memory:
        """Main memory of this machine."""
        return read_memory(self.root)

    @property
    def is_small(self) -> bool:
        """Whether the model is so small that speed does not matter: a demo's, a test's."""
        return self.needs.is_small

    @property
    def model_path(self) -> Path:
        return Path(self.values["KT_MODEL_PATH"])

    @property
    def weight_path(self) -> Path:
        return Path(self.values["KT_WEIGHT_PATH"])


Check = Callable[[Situation], Iterator[Result]]


def check_packages(situation: Situation) -> Iterator[Result]:
    """SGLang in the version this was made for, and the compiled kernel."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        yield Result(
            "sglang",
            Status.FAIL,
            f"SGLang {SGLANG_VERSION}",
            "none",
            f"pip install sglang=={SGLANG_VERSION} into the environment that runs this",
        )
    else:
        same = version == SGLANG_VERSION
        yield Result(
            "sglang",
            Status.PASS if same else Status.WARN,
            f"SGLang {SGLANG_VERSION}",
            version,
            "" if same else f"other versions are not tested: pip install sglang=={SGLANG_VERSION}",
        )
    built = importlib.util.find_spec("kt_kernel._ext") is not None
    yield Result(
        "kernel",
        Status.PASS if built else Status.FAIL,
        "the compiled extension of kt_kernel",
        "kt_kernel._ext" if built else "none",
        "" if built else "build it: pip install .",
    )


def check_threads(situation: Situation) -> Iterator[Result]:
    """Threads of the experts against what this process may use.

    More threads than CPUs is a FAIL and not a warning: every layer waits for its slowest thread,
    so one shared CPU halves the speed of the whole server and nothing else would show it.
    """
    machine = situation.machine
    threads: int = situation.values["KT_CPUINFER"]
    pools: int = situation.values["KT_THREADPOOL_COUNT"]
    cpus = f"{machine.cores} cores with {machine.cpus} CPUs in this process's CPU set"
    gpus = gpus_used(situation.values)
    auto = machine.expert_threads(gpus)
    expected = f"KT_CPUINFER of at most {machine.cores}"
    if threads > machine.cpus:
        yield Result(
            "threads",
            Status.FAIL,
            expected,
            f"{threads} threads for {cpus}",
            f"set KT_CPUINFER={auto} or auto",
        )
    elif machine.cpu_quota is not None and threads > machine.cpu_quota:
        yield Result(
            "threads",
            Status.FAIL,
            f"KT_CPUINFER of at most {machine.cpu_quota:g}",
            f"{threads} threads for a control group's quota of {machine.cpu_quota:g} CPUs",
            f"raise the quota or set KT_CPUINFER={auto}",
        )
    elif threads > machine.cores:
        yield Result(
            "threads",
            Status.WARN,
            expected,
            f"{threads} threads for {cpus}",
            f"two threads of a core share its units: set KT_CPUINFER={auto} or auto",
        )
    elif gpus and threads > auto:
        yield Result(
            "threads",
            Status.WARN,
            f"KT_CPUINFER of at most {auto}, which leaves {cpus_beside_experts(gpus)} CPUs to "
            f"SGLang's schedulers and CUDA's host functions",
            f"{threads} threads for {machine.usable_cpus} CPUs",
            f"each layer would wait for time slices: set KT_CPUINFER={auto} or auto",
        )
    else:
        yield Result("threads", Status.PASS, expected, f"{threads} threads for {cpus}")
    if pools > threads:
        yield Result(
            "thread-pools",
            Status.FAIL,
            f"KT_THREADPOOL_COUNT of at most KT_CPUINFER={threads}",
            f"{pools}",
            "a pool needs a thread: lower KT_THREADPOOL_COUNT",
        )
    else:
        best = min(machine.numa_nodes, threads)
        fits = pools == best
        yield Result(
            "thread-pools",
            Status.PASS if fits else Status.WARN,
            f"one pool per NUMA node, that is KT_THREADPOOL_COUNT={best}",
            f"{pools}",
            "" if fits else "set it to that or to auto",
        )


def check_port(situation: Situation) -> Iterator[Result]:
    """The server's address is free."""
    host, port = situation.values["KT_HOST"], situation.values["KT_PORT"]
    expected = f"port {port} on {host} to be free"
    problem = address_problem(host, port)
    if problem is None:
        yield Result("port", Status.PASS, expected, "it free")
    else:
        found, todo = problem
        yield Result("port", Status.FAIL, expected, found, todo)


def address_problem(host: str, port: int) -> tuple[str, str] | None:
    """What keeps a server from listening there and what to do; None if nothing does."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        return f"that {host} is no address ({error.strerror})", "set KT_HOST to 0.0.0.0"
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "another program listening there", "stop it or set KT_PORT to another port"
            if error.errno == errno.EACCES:
                return "that it needs root", "set KT_PORT to 1024 or more"
            return os.strerror(error.errno or 0), "set KT_HOST to an address of this machine"
    return None


@dataclass(frozen=True)
class Entry:
    """A check and when it runs.

    Attributes:
        check: the function.
        serve: ``serve`` runs it before it starts.
        sized: it compares with the model's size; before serving, that of a model that is not there
            is not guessed.
        host: it looks at the machine only and needs no model (``check --host``).
    """

    check: Check
    serve: bool
    sized: bool = False
    host: bool = True


def all_checks() -> tuple[Entry, ...]:
    """Every check, in the order of the report."""
    from deploy import checks_cpu, checks_gpu, checks_machine, checks_model

    return (
        Entry(check_packages, True),
        Entry(checks_cpu.check_instruction_set, True),
        Entry(checks_cpu.check_amx, True),
        Entry(checks_gpu.check_device, True),
        Entry(checks_gpu.check_compute_capability, True),
        Entry(checks_gpu.check_driver, True),
        Entry(checks_gpu.check_gpu_memory, True, sized=True),
        Entry(check_threads, True),
        Entry(checks_cpu.check_cpu_limits, True),
        Entry(checks_machine.check_memory, True, sized=True),
        Entry(checks_machine.check_numa_memory, True, sized=True),
        Entry(checks_machine.check_memory_policy, True),
        Entry(checks_machine.check_overcommit, True, sized=True),
        Entry(checks_machine.check_locked_memory, True),
        Entry(checks_machine.check_huge_pages, True),
        Entry(checks_machine.check_shared_memory, True),
        Entry(checks_machine.check_disk, False),
        Entry(checks_machine.check_run_directory, False),
        Entry(checks_machine.check_home, True),
        Entry(checks_model.check_model, True, host=False),
        Entry(checks_model.check_weights, True, host=False),
        Entry(check_port, True),
    )


def run_checks(situation: Situation, entries: Iterable[Entry]) -> list[Result]:
    """Run the checks in order; a FAIL that the settings tell to ignore becomes a WARN."""
    ignored = situation.values["KT_IGNORE_CHECKS"] or ()
    results = [result for entry in entries for result in entry.check(situation)]
    return [
        replace(result, status=Status.WARN, todo=f"{result.todo} (KT_IGNORE_CHECKS ignores it)")
        if result.status is Status.FAIL and result.check in ignored
        else result
        for result in results
    ]
