"""A throwaway copy of the repository, with an interpreter and a build of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.mutants.faults import Fault

#: Name of the plugin in the copy's interpreter.
RECORDER = "kt_mutants_recorder"
EXTENSION = "kt_kernel._ext"
START_SECONDS = 1800


class TreeError(Exception):
    """The copy cannot be made or used; the message says why."""


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: exit status, negative for a signal; None where it ran into its limit and was killed.
        output: stdout and stderr.
    """

    code: int | None
    output: str


class Tree:
    """The copy, in ``folder``.

    Args:
        root: the repository; it is only read.
        folder: an empty folder, or one that an earlier copy was made in, whose build is used again.
        jobs: compilers that run at the same time.
    """

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self._root, self._folder, self._jobs = root, folder, jobs
        self.path = folder / "tree"
        self._build, self._sound_build = folder / "build", folder / "sound-build"
        self._python = folder / "env" / "bin" / "python"
        self._is_compiled = (root / "CMakeLists.txt").exists()
        self._environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
        self._faults = 0  # so far

    def make(self) -> None:
        """Copy, build, and check that it is the copy that its interpreter imports.

        Raises:
            TreeError: it cannot be built.
        """
        self._copy()
        self._make_interpreter()
        if self._is_compiled:
            if self._sound_build.exists():  # a run that was killed may have left a fault's objects
                shutil.rmtree(self._build, ignore_errors=True)
                shutil.copytree(self._sound_build, self._build)
            self._configure()
            if (ended := self._compile()).code != 0:
                raise TreeError(f"the tree does not compile:\n{ended.output}")
            shutil.rmtree(self._sound_build, ignore_errors=True)
            shutil.copytree(self._build, self._sound_build)
        self._check_imports()

    def _copy(self) -> None:
        """What git knows and what it would take, as it is now; times stay, for the build."""
        shutil.rmtree(self.path, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self._root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in sorted(set(filter(None, listed.split("\0")))):
            source, target = self._root / name, self.path / name
            if source.is_file():  # what was deleted is listed, too
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def _make_interpreter(self) -> None:
        """One that finds this one's packages, but not what the project's installation hooks in."""
        folder = self._folder / "env"
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        paths = {"base": str(folder), "platbase": str(folder)}
        packages = Path(sysconfig.get_path("purelib", "venv", paths))
        # Folders that a .pth file names are searched, but .pth files in them are not read.
        installed = [path for path in sys.path if Path(path).name == "site-packages"]
        (packages / "copy.pth").write_text("\n".join([str(self.path), *installed]) + "\n")
        shutil.copy2(Path(__file__).with_name("recorder.py"), packages / f"{RECORDER}.py")
        (self._folder / "tmp").mkdir(exist_ok=True)

    def _configure(self) -> None:
        here = Path(sys.executable).parent
        tools = {
            name: shutil.which(name, path=f"{here}{os.pathsep}{os.environ['PATH']}")
            for name in ("cmake", "ninja")
        }
        if missing := [name for name, path in tools.items() if path is None]:
            raise TreeError(f"no {' and no '.join(missing)} found: install the package")
        self._cmake = str(tools["cmake"])
        shown = self.run(["-m", "pybind11", "--cmakedir"], 600)
        ended = self._start(
            [
                self._cmake,
                *("-S", str(self.path), "-B", str(self._build), "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
                f"-DPython_EXECUTABLE={self._python}",
                f"-Dpybind11_DIR={shown.output.strip()}",
            ],
            600,
        )
        if ended.code != 0:
            raise TreeError(f"cmake failed:\n{ended.output}")

    def _compile(self) -> Ended:
        argv = [self._cmake, "--build", str(self._build), "-j", str(self._jobs)]
        if (ended := self._start(argv, 3600)).code == 0:
            self._place_extension()
        return ended

    def _place_extension(self) -> None:
        (built,) = self._build.glob("_ext.*.so")
        shutil.copy2(built, self.path / "kt_kernel")

    def _check_imports(self) -> None:
        """An installed or another package of the same name would be tested in the copy's place."""
        names = [path.parent.name for path in self.path.glob("*/__init__.py")]
        if self._is_compiled:
            names.append(EXTENSION)
        program = (
            "import importlib.util, sys\n"
            "for name in sys.argv[1:]: print(importlib.util.find_spec(name).origin)"
        )
        ended = self.run(["-c", program, *names], 300)
        if ended.code != 0:
            raise TreeError(f"the copy cannot be imported:\n{ended.output}")
        for name, origin in zip(names, ended.output.splitlines(), strict=True):
            if not Path(origin).is_relative_to(self.path):
                raise TreeError(f"{name} would be imported from {origin} and not from the copy")

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[str]:
        """The copy has the fault within the block; gives the compiler's output if it failed."""
        file = self.path / fault.file
        sound, times = file.read_text(), file.stat()
        compiles = self._is_compiled and fault.file.startswith("csrc/")
        try:
            file.write_text(sound.replace(fault.old, fault.new))
            # Python knows a .pyc file by whole seconds: each fault has others, and so has the file.
            self._faults += 1
            later = max(time.time_ns(), times.st_mtime_ns + 2 * 10**9 * self._faults)
            os.utime(file, ns=(later, later))
            ended = self._compile() if compiles else Ended(0, "")
            yield "" if ended.code == 0 else ended.output or "the compiler ran into its limit"
        finally:
            file.write_text(sound)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            if compiles:  # only what the next fault changes is compiled again
                shutil.rmtree(self._build)
                shutil.copytree(self._sound_build, self._build)
                self._place_extension()

    def run(self, words: Sequence[str], limit: float, progress: Path | None = None) -> Ended:
        """Run the copy's interpreter in the copy.

        Args:
            words: its arguments.
            limit: seconds that it may take; with ``progress`` seconds without any.
            progress: a file that grows while it gets on.
        """
        return self._start([str(self._python), *words], limit, progress)

    def _start(self, argv: Sequence[str], limit: float, progress: Path | None = None) -> Ended:
        with subprocess.Popen(
            argv,
            cwd=self.path,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            size, since = 0, time.monotonic()
            try:
                while True:
                    try:
                        output, _ = process.communicate(timeout=min(1.0, limit))
                        break
                    except subprocess.TimeoutExpired:
                        pass
                    grown = progress.stat().st_size if progress and progress.exists() else 0
                    if grown != size:
                        size, since = grown, time.monotonic()
                    # Until the first progress the machine may be busy with imports.
                    allowed = limit if size or not progress else max(limit, START_SECONDS)
                    if time.monotonic() - since > allowed:
                        os.killpg(process.pid, signal.SIGKILL)
                        return Ended(None, process.communicate()[0])
            except BaseException:  # an interruption: nothing is left running
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return Ended(process.returncode, output)
