"""A Docker engine of the tests' own: started from Debian's packages, nothing left when it stops.

All processes of a test run use one engine: the first that needs it starts it, and the process that
began the run stops it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KEEP = "DOCKER_TESTS_KEEP"
"""Environment variable: a folder whose engine data is kept and used again by the next run."""
ROOT = "DOCKER_TESTS_ROOT"
"""Environment variable, set by ``run_of_tests``: the folder of this run's engine."""
NEEDED_BYTES = 30 * 10**9
START_SECONDS = 60.0
MAKE_VARIABLES = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
REPOSITORY = Path(__file__).resolve().parents[2]


class EngineUnavailable(Exception):
    """No engine can run here; the message says why and what would change that."""


@dataclass(frozen=True)
class Engine:
    """A running engine.

    Attributes:
        root: its folder: socket, data, the client's configuration with compose and buildx.
    """

    root: Path

    @property
    def url(self) -> str:
        return f"unix://{self.root}/docker.sock"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make the docker client use this engine."""
        return {
            "DOCKER_HOST": self.url,
            "DOCKER_CONFIG": str(self.root / "client"),
            "DOCKER_BUILDKIT": "1",
        }

    def docker(
        self, *arguments: str, check: bool = True, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run the docker client."""
        return run(["docker", *arguments], self.environment, check=check, timeout=timeout)


def run(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    check: bool = True,
    timeout: float = 300,
    folder: Path = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is in the exception when it fails."""
    # Tests are often run by make, whose variables would make a make that they start a part of it:
    # it would share its jobs and print the directories that it enters.
    inherited = {k: v for k, v in os.environ.items() if k not in MAKE_VARIABLES}
    result = subprocess.run(
        command,
        env={**inherited, **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and result.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-6000:]}"
            f"\n{result.stderr[-6000:]}"
        )
    return result


@contextmanager
def run_of_tests() -> Iterator[None]:
    """A test run: the engine that it may start is stopped, and removed with all its data."""
    kept = os.environ.get(KEEP)
    root = Path(kept or tempfile.mkdtemp(prefix="docker-tests-"))
    os.environ[ROOT] = str(root)
    try:
        yield
    finally:
        del os.environ[ROOT]
        if (root / "pid").exists():
            stop_daemon(Engine(root))
        if not kept:
            subprocess.run(["umount", str(root / "data")], capture_output=True, check=False)
            shutil.rmtree(root, ignore_errors=True)


def shared_engine() -> Engine:
    """The engine of this run, started unless another process has.

    Raises:
        EngineUnavailable: it cannot be started here.
    """
    # Here, since tests/conftest.py imports this file where there may be no such package.
    from filelock import FileLock

    require()
    root = Path(os.environ[ROOT])
    root.mkdir(parents=True, exist_ok=True)
    engine = Engine(root)
    with FileLock(root / "start.lock"):
        if engine.docker("info", check=False).returncode == 0:
            return engine
        free = shutil.disk_usage(root).free
        if free < NEEDED_BYTES:
            raise EngineUnavailable(f"{root} has {free / 1e9:.0f} GB free, 30 GB are needed")
        install_plugins(root)
        start_daemon(engine)
    return engine


def require() -> None:
    """Raise EngineUnavailable unless an engine could be started."""
    if os.getuid() != 0:
        raise EngineUnavailable("the engine needs root, and these tests do not run as root")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    for program, package in (
        ("docker", "docker.io"),
        ("dockerd", "docker.io"),
        ("iptables", "iptables"),
        ("debootstrap", "debootstrap"),
        ("apt-get", "apt"),
    ):
        if shutil.which(program, path=path) is None:
            raise EngineUnavailable(f"{program} is not there: install the package {package}")


def start_daemon(engine: Engine) -> None:
    """Start dockerd and wait until it answers."""
    root = engine.root
    with (root / "engine.log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--data-root", str(root / "data"), "--exec-root", str(root / "exec")),
                *("--pidfile", str(root / "pid"), "-H", engine.url, "--mtu", "1400"),
            ],
            env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and daemon.poll() is None:
        if engine.docker("info", check=False).returncode == 0:
            return
        time.sleep(0.1)
    if daemon.poll() is None:
        daemon.kill()
        daemon.wait()
    lines = (root / "engine.log").read_text(errors="replace").splitlines()
    raise EngineUnavailable("dockerd does not start: " + " | ".join(lines[-3:]))


def stop_daemon(engine: Engine) -> None:
    """Remove all containers, then end the engine by its process."""
    import psutil

    left = engine.docker("ps", "-aq", check=False).stdout.split()
    if left:
        engine.docker("rm", "-f", "-v", *left, check=False)
    try:
        daemon = psutil.Process(int((engine.root / "pid").read_text()))
        daemon.terminate()
        daemon.wait(60)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return
    except psutil.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def install_plugins(root: Path) -> None:
    """Give the client of ``root`` compose and buildx: the system's, or those of Debian's trixie.

    They are unpacked into ``root``.
    """
    plugins = root / "client" / "cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ("compose", "buildx") if not (plugins / f"docker-{name}").exists()]
    if not missing:
        return
    names = [f"docker-{name}" for name in missing]
    unpacked = unpack_trixie(root / "plugins", *names)
    for name in names:
        found = unpacked / "usr/libexec/docker/cli-plugins" / name
        if not found.exists():
            raise EngineUnavailable(f"no {name} in Debian's trixie")
        (plugins / name).symlink_to(found)


def unpack_trixie(work: Path, *packages: str) -> Path:
    """Unpack packages of Debian's trixie into a folder of ``work``, which is returned.

    apt reads a configuration of its own, so that the system's suites stay as they are.
    """
    uri = debian_uris()[0]
    for name in ("parts", "lists/partial", "cache/archives/partial", "unpacked"):
        (work / name).mkdir(parents=True, exist_ok=True)
    (work / "parts" / "trixie.sources").write_text(
        f"Types: deb\nURIs: {uri}\nSuites: trixie\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    options = [
        *("-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={work}/parts"),
        *("-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}/cache"),
        *("-o", "APT::Sandbox::User=root"),
    ]
    run(["apt-get", "-q", *options, "update"])
    chosen = [f"{package}/trixie" for package in packages]  # not the version that is installed
    run(["apt-get", "-q", *options, "download", *chosen], folder=work)
    for archive in work.glob("*.deb"):
        run(["dpkg", "-x", str(archive), str(work / "unpacked")])
    return work / "unpacked"


def debian_uris() -> list[str]:
    """Addresses of Debian's archive and, if it is apart, of its security archive.

    They come from the system's own apt sources.

    Raises:
        EngineUnavailable: there are none.
    """
    found: list[str] = []
    files = [*Path("/etc/apt/sources.list.d").glob("*"), Path("/etc/apt/sources.list")]
    for file in sorted(path for path in files if path.is_file()):
        for uri in re.findall(r"^(?:URIs:|deb )\s*(?:\[.*\] )?(\S+)", file.read_text(), re.M):
            if re.search(r"/debian(-security)?/?$", uri):
                found.append(uri.rstrip("/"))
    found.sort(key=lambda uri: uri.endswith("-security"))
    if not found or found[0].endswith("-security"):
        raise EngineUnavailable("no address of Debian's archive in the system's apt sources")
    return found


def make_base_image(engine: Engine, tag: str) -> None:
    """Bootstrap Debian bookworm and import it as the image ``tag``, unless it is there."""
    if engine.docker("image", "inspect", tag, check=False).returncode == 0:
        return
    uris = debian_uris()
    tree = engine.root / "bookworm"
    shutil.rmtree(tree, ignore_errors=True)
    run(["debootstrap", "--variant=minbase", "bookworm", str(tree), uris[0]], timeout=900)
    suites = [f"deb {uris[0]} bookworm main", f"deb {uris[0]} bookworm-updates main"]
    suites += [f"deb {u} bookworm-security main" for u in uris if u.endswith("-security")]
    (tree / "etc/apt/sources.list").write_text("\n".join(suites) + "\n")
    for path in (tree / "var/cache/apt/archives").glob("*.deb"):
        path.unlink()
    shutil.rmtree(tree / "var/lib/apt/lists")
    with subprocess.Popen(["tar", "-C", str(tree), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["docker", "import", "-c", 'CMD ["bash"]', "-", tag],
            env={**os.environ, **engine.environment},
            stdin=tar.stdout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    assert tar.returncode == 0
    shutil.rmtree(tree)
