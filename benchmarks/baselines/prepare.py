"""Download and build the baselines into a folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import limits
from benchmarks.baselines import MANIFEST, this_python
from benchmarks.errors import BenchmarkError
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import read_fields

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"

#: Builds of kt-kernel's extension that are kept: one for each instruction set that changes what the
#: measured methods run on. The wheel's other builds and its CUDA parts are left out.
KT_KERNEL_BUILDS = ("amx", "avx512_bf16", "avx512_vnni", "avx2")
#: Builds of ggml's CPU backend, by ggml's names.
GGML_BUILDS = ("haswell", "icelake", "zen4", "sapphirerapids")

_PLATFORM = "manylinux_2_35_x86_64"


def prepare(output: Path, python_version: str) -> None:
    """Make ``output`` a folder of baselines for ``python_version``, such as ``"3.12"``.

    Raises:
        BenchmarkError: a download or a build failed.
    """
    output = output.absolute()  # CMake takes relative paths as relative to its source folder
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        work = Path(folder)
        versions = {
            "kt-kernel": _prepare_kt_kernel(work, output / "kt-kernel", python_version),
            "llama-cpp-python": _prepare_ggml(work, output / "ggml"),
        }
    limits.compile_probe(output / limits.probe_name())
    manifest = {"python": python_version, "platform": _PLATFORM, "versions": versions}
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def ensure(output: Path) -> None:
    """``prepare`` for this Python, unless ``output`` is already prepared from the same versions."""
    with contextlib.suppress(UserError):  # not there, or damaged: made again
        if read_fields(output / MANIFEST).texts("versions") == pinned_versions():
            return
    print(f"preparing the baselines in {output}: minutes, once", file=sys.stderr)
    prepare(output, this_python())


def pinned_versions() -> dict[str, str]:
    """Package -> version of the requirements files."""
    texts = (path.read_text() for path in REQUIREMENTS.glob("*.txt"))
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", "\n".join(texts), re.MULTILINE))


def _run(command: list[str], what: str) -> None:
    # The tools that were installed beside this interpreter are found first.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PATH=path))
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BenchmarkError(f"{what} failed:\n{tail}")


def _download(name: str, target: Path, options: list[str]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-r", str(REQUIREMENTS / f"{name}.txt")]
    _run([*command, "-d", str(target), *options], f"the download of {name}")
    (found,) = target.iterdir()
    return found


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the block ends well."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    yield fresh
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _prepare_kt_kernel(work: Path, target: Path, python_version: str) -> str:
    options = ["--only-binary", ":all:", "--python-version", python_version]
    wheel = _download("kt-kernel", work / "wheel", [*options, "--platform", _PLATFORM])
    builds = "|".join(KT_KERNEL_BUILDS)
    wanted = re.compile(
        rf"kt_kernel/_kt_kernel_ext_({builds})\.[^/]*|kt_kernel/_cpu_detect\.py|kt_kernel\.libs/.*"
    )
    with _replaced(target) as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if wanted.fullmatch(n)])
    return pinned_versions()["kt-kernel"]


def _prepare_ggml(work: Path, target: Path) -> str:
    # The build environment is this one, which has scikit-build-core; nothing is built by pip.
    options = ["--no-binary", ":all:", "--no-build-isolation"]
    package = _download("llama-cpp-python", work / "sdist", options)
    with tarfile.open(package) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.glob("llama_cpp_python-*/vendor/llama.cpp/ggml")
    build = work / "build"
    configure = ["cmake", "-G", "Ninja", "-S", str(HERE / "ggml"), "-B", str(build)]
    _run([*configure, "-DCMAKE_BUILD_TYPE=Release", f"-DGGML_SOURCE={source}"], "cmake")
    targets = ["ggml_layer", *(f"ggml-cpu-{name}" for name in GGML_BUILDS)]
    _run(["cmake", "--build", str(build), "--target", *targets], "the build of ggml")
    with _replaced(target) as folder:
        names = ["libggml_layer.so", *(f"libggml-cpu-{name}.so" for name in GGML_BUILDS)]
        for name in [*names, "libggml-base.so.0"]:  # the name that the others look for
            shutil.copy(build / "bin" / name, folder / name)
    return pinned_versions()["llama-cpp-python"]
