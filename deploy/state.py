"""What a stage is doing, in a small file that others can read: ``KT_RUN_DIR/<stage>.json``.

Written whole or not at all, by the stage itself; ``health`` and ``status`` read it. A lock beside
it, which the kernel releases with the process, tells readers in other containers that the stage
lives. Writing is best effort: a stage never fails because nobody could be told about it. The files
are in a directory of their own and not beside the model or the weights, which stay the same to the
byte however often a run was interrupted, and may be mounted read-only.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.console import say
from deploy.settings.row import AUTO
from kt_kernel import server_phase
from kt_kernel.errors import UserError, one_line
from kt_kernel.files.foreign import read_fields
from kt_kernel.files.locks import CannotLock, try_lock
from kt_kernel.files.units import gigabytes_of
from kt_kernel.load_progress import PROGRESS_VARIABLE
from kt_kernel.server_phase import told_phase

DONE, FAILED, READY, WAITING = "done", "failed", "ready", "waiting"
ENDING, STOPPED = "ending", "stopped"  # told to; and it has ended
RESTARTING = "restarting"  # only told, by those who wait whether it is so
COPYING = "copying weights"
HOST = "{host}"
"""Stands for the name of this host, or container, in ``KT_RUN_DIR``."""
SERVERS = "servers"
"""Folder in which several servers of a deployment have a directory of states each."""
PROGRESS_SECONDS = 5.0
#: A reader holds the lock for a moment; another stage holds it longer.
LOCK_SECONDS = 0.5
LARGEST_PID = 1 << 22  # Linux's own limit
_LAYERS_FILE = "serve-layers.json"  # written by kt_kernel while it loads


@dataclass(frozen=True)
class State:
    """One stage's state.

    Attributes:
        stage: ``check``, ``download``, ``convert`` or ``serve``.
        phase: what it is doing (``downloading``, ``verifying``, ``converting``, ``checking``,
            ``loading``, ``ready``, ``ending`` ...), or ``done``, ``failed``, ``stopped``,
            ``restarting`` or ``waiting``.
        message: the reason of a failure, an end or a restart, or what is waited for; else empty.
        done, total: progress in ``unit``; None where there is nothing to count.
        unit: ``bytes``, ``layers`` or ``servers``.
        pid: of the stage's process, in the PID namespace ``pid_namespace``.
        pid_started: start of that process in clock ticks since the machine's start, because pids
            are used again.
        started, updated: seconds since the epoch.
    """

    stage: str
    phase: str
    message: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    pid: int = 0
    pid_started: int = 0
    pid_namespace: str = ""
    started: float = 0.0
    updated: float = 0.0

    @property
    def may_listen(self) -> bool:
        """Whether it is that of a server which has passed its checks."""
        early = ("starting", "checking", COPYING, WAITING, FAILED)
        return self.stage == "serve" and self.phase not in early

    def line(self) -> str:
        """The state in one line for people."""
        if self.phase in (FAILED, RESTARTING, STOPPED):
            return f"{self.phase}: {self.message}"
        if self.phase == DONE:
            return f"{self.stage} finished"
        if self.phase == WAITING:
            return f"{self.stage} waits for {self.message}"
        if self.done is None or self.total is None:
            return self.phase
        if self.unit == "bytes":
            return f"{self.phase} {gigabytes_of(self.done, self.total)}"
        return f"{self.phase} {self.done} of {self.total} {self.unit}"

    def is_alive(self, directory: Path) -> bool:
        """Whether the stage's process, whose state is in ``directory``, still runs.

        A process of another container cannot be seen: it lives while its lock is held.
        """
        if self.pid_namespace != _pid_namespace():
            return _is_locked(_lock_path(directory, self.stage))
        return self.pid_started != 0 and _process_start(self.pid) == self.pid_started


def _process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if there is no such process."""
    try:
        # The second field, the name, may hold spaces and brackets: count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _lock_path(directory: Path, stage: str) -> Path:
    return directory / f".{stage}.lock"


def _take_lock(path: Path) -> int | None:
    """Lock a file until this process ends; its descriptor, None if another process has it.

    Where there can be no lock the descriptor is -1.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return -1  # the first write of the state says why
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            if try_lock(fd, path.parent):
                break
        except CannotLock:
            os.close(fd)
            return -1
        if time.monotonic() > deadline:
            os.close(fd)
            return None
        time.sleep(0.01)
    # Never closed; SGLang's server, which this process may become, inherits it.
    os.set_inheritable(fd, True)
    return fd


def _forget_ended(directory: Path, stage: str) -> None:
    """Remove the states of ended processes beside ``directory``: of containers that it replaces.

    Only for a directory that is new. A process that an engine starts again has one already, and
    takes no other's: when all fail, what each left says so. The lock is held meanwhile, so that a
    process that starts there waits and then writes its state.
    """
    for path in directory.parent.glob(f"*/{stage}.json"):
        lock_path = _lock_path(path.parent, stage)
        if path.parent == directory or _is_locked(lock_path):
            continue
        fd = _take_lock(lock_path)
        if fd is not None and fd >= 0:
            with suppress(OSError):
                path.unlink()
            os.close(fd)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not try_lock(fd, path.parent, shared=True)
    except CannotLock:
        return False
    finally:
        os.close(fd)


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def run_directory(setting: str | Path) -> Path:
    """Where the state files are: the value of ``KT_RUN_DIR``, with ``auto`` and ``{host}``
    resolved."""
    if str(setting) != AUTO:
        return Path(str(setting).replace(HOST, socket.gethostname()))
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "kt-kernel"
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError:  # no directory can be written; whoever writes there says so
        temporary = Path("/tmp")
    return temporary / f"kt-kernel-{os.getuid()}"


def read_state(directory: Path, stage: str) -> State | None:
    """The state that a stage left, None if there is none that can be read."""
    try:
        found = read_fields(directory / f"{stage}.json")
        counts = [name for name in ("done", "total") if found.has(name)]
        state = State(
            stage=found.text("stage"),
            phase=found.text("phase"),
            message=found.text("message", ""),
            unit=found.text("unit", ""),
            pid=found.integer("pid", maximum=LARGEST_PID, default=0),
            pid_started=found.integer("pid_started", default=0),
            pid_namespace=found.text("pid_namespace", ""),
            started=found.number("started", 0.0),
            updated=found.number("updated", 0.0),
            **{name: found.integer(name) for name in counts},
        )
    except UserError:
        return None
    if state.stage != stage:
        return None
    return _with_phase(directory, state) if state.may_listen else state


def _with_phase(directory: Path, state: State) -> State:
    """The state of a server that has passed its checks, with what it says of itself."""
    told = told_phase(directory)
    if told is not None:
        return replace(state, phase=ENDING if told == server_phase.ENDING else READY)
    return _with_layers(directory, state) if state.phase == "loading" else state


def _with_layers(directory: Path, state: State) -> State:
    """The state of a server that loads, with what kt_kernel says of it."""
    try:
        found = read_fields(directory / _LAYERS_FILE)
        done, total = found.integer("done"), found.integer("total")
    except UserError:
        return state
    return replace(state, done=done, total=total, unit="layers")


def write_state(directory: Path, state: State) -> None:
    """Replace a state file as a whole.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{state.stage}.json"
    fd, temporary = tempfile.mkstemp(dir=directory, prefix=f".{state.stage}-")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(asdict(state), indent=1) + "\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class StageState:
    """Keeps the state file of this process's stage.

    Says nothing while another live process has the same stage in the same directory: the state of
    a running server is not that of the second one that found its port taken.
    """

    def __init__(self, directory: Path, stage: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._lock_fd = _take_lock(_lock_path(directory, stage))
        self._silent = self._lock_fd is None
        if directory.parent.name == SERVERS and read_state(directory, stage) is None:
            _forget_ended(directory, stage)
        self._state = State(
            stage,
            "starting",
            pid=os.getpid(),
            pid_started=_process_start(os.getpid()),
            pid_namespace=_pid_namespace(),
            started=time.time(),
        )
        self.set("starting")  # what an earlier process left here is over

    def set(self, phase: str, message: str = "") -> None:
        """Say what the stage does now."""
        self._write(phase=phase, message=one_line(message), done=None, total=None, unit="")

    def for_server(self) -> dict[str, str]:
        """Environment in which the server that this process becomes says how far it has loaded."""
        if self._silent:
            return {}
        path = self._directory / _LAYERS_FILE
        for earlier in (path, self._directory / server_phase.FILE_NAME):
            with suppress(OSError):
                earlier.unlink()
        return {PROGRESS_VARIABLE: str(path)}

    def fail(self, reason: str) -> None:
        """Say why the stage ended."""
        self.set(FAILED, reason)

    def begin(self) -> None:
        """Say that the work begins now: what waited before counts as started now."""
        self._write(started=time.time(), phase="starting", message="")

    def hand_over(self) -> None:
        """Leave the state to the same stage, which this process is about to become again."""
        if self._lock_fd is not None and self._lock_fd >= 0:
            os.set_inheritable(self._lock_fd, False)

    @contextmanager
    def watch(
        self, phase: str, total: int, done: Callable[[], int], unit: str = "bytes"
    ) -> Iterator[None]:
        """While the block runs, say every few seconds how much is done."""
        stop = threading.Event()

        def tell() -> None:
            self._write(phase=phase, message="", done=done(), total=total, unit=unit)

        def repeat() -> None:
            while not stop.wait(PROGRESS_SECONDS):
                tell()

        tell()
        thread = threading.Thread(target=repeat, name="state", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._state = replace(self._state, updated=time.time(), **changes)
            if self._silent:
                return
            try:
                write_state(self._directory, self._state)
            except OSError as error:
                self._silent = True
                say(
                    f"warning: cannot write the state to KT_RUN_DIR {self._directory} "
                    f"({error.strerror}): `health` will not know about this stage"
                )
