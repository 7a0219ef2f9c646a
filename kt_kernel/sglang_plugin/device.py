"""Where a server computes: on a GPU, or on the CPU alone. Decided here, nowhere else."""

import os
from collections.abc import Mapping
from pathlib import Path

from kt_kernel.errors import UserError
from kt_kernel.host.gpus import count_gpus
from kt_kernel.sglang_plugin.registration import with_our_plugin

DEVICES = ("auto", "cuda", "cpu")
STAND_IN_PATH = Path(__file__).resolve().parent / "cpu_mode" / "stand_in"
"""Folder of the ``sgl_kernel`` stand-in; first on PYTHONPATH in CPU mode."""


def detect_device() -> str:
    """Return "cuda" if the NVIDIA driver shows at least one GPU, else "cpu".

    Asks the driver itself, so that a launcher need not import torch.
    CUDA_VISIBLE_DEVICES is respected.
    """
    return "cuda" if count_gpus() > 0 else "cpu"


def launch_environment(device: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables to set, on top of ``environ``, before SGLang starts.

    ``device`` is "auto", "cuda" or "cpu"; ``environ`` (default ``os.environ``) is
    where lists to extend (PYTHONPATH, SGLANG_PLUGINS) are read. With a GPU the result
    records the decision (KT_DEVICE), so that every process of the server agrees on it,
    and changes nothing else that is not set. Raises :class:`UserError` for any other device.
    """
    environ = os.environ if environ is None else environ
    device = _known_device(device)
    if device == "auto":
        device = detect_device()
    plugins = with_our_plugin(environ)
    if device == "cuda":
        return {"KT_DEVICE": "cuda", **plugins}
    python_path = [str(STAND_IN_PATH)]
    for entry in environ.get("PYTHONPATH", "").split(os.pathsep):
        if entry and entry not in python_path:
            python_path.append(entry)
    return {
        "KT_DEVICE": "cpu",
        # SGLang's own switch; without it SGLang stops when it finds no GPU.
        "SGLANG_USE_CPU_ENGINE": "1",
        # The real sgl_kernel cannot be imported without libcuda.
        "PYTHONPATH": os.pathsep.join(python_path),
        # On a host that has a GPU but is told not to use it.
        "CUDA_VISIBLE_DEVICES": "",
        # SGLang compiles its routing helpers with torch.compile on first use: half a minute
        # and a C++ compiler, to save microseconds.
        "TORCHDYNAMO_DISABLE": "1",
        **plugins,
    }


def runs_on_cpu(environ: Mapping[str, str] | None = None) -> bool:
    """True if this SGLang process is to run without a GPU.

    KT_DEVICE decides if it is set to "cpu" or "cuda", then SGLang's own
    SGLANG_USE_CPU_ENGINE=1, then whether torch sees a GPU.
    """
    environ = os.environ if environ is None else environ
    device = _known_device(environ.get("KT_DEVICE") or "auto")
    if device != "auto":
        return device == "cpu"
    if environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return True
    import torch

    return not torch.cuda.is_available()


def check_cpu_environment(environ: Mapping[str, str] | None = None) -> None:
    """Raise :class:`UserError` unless :func:`launch_environment` was applied for the CPU."""
    environ = os.environ if environ is None else environ
    missing = []
    if environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        missing.append("SGLANG_USE_CPU_ENGINE=1")
    if environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(STAND_IN_PATH):
        missing.append(f"PYTHONPATH={launch_environment('cpu', environ)['PYTHONPATH']}")
    if missing:
        raise UserError(
            "this server runs without a GPU, but its environment is not prepared for that: set "
            f"{' and '.join(missing)}, or start it with `python entrypoint.py serve`"
        )


def _known_device(device: str) -> str:
    if device not in DEVICES:
        raise UserError(f"KT_DEVICE is {device!r}; expected one of {', '.join(DEVICES)}")
    return device
