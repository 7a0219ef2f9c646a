"""A server that would be wrong does not start: status, process group, one clear line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.server import Server

pytestmark = pytest.mark.serve

# A second plugin that, in one kind of process only, takes a hook's target away, as another
# version of SGLang might.
SABOTEUR = """
import inspect

def register():
    if any(frame.function == "{process}" for frame in inspect.stack()):
        from sglang.srt.model_executor.model_runner import ModelRunner
        del ModelRunner.load_model
"""


def install_saboteur(folder: Path, process: str) -> None:
    metadata = folder / "saboteur-1.dist-info"
    metadata.mkdir()
    (folder / "saboteur.py").write_text(SABOTEUR.format(process=process))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: saboteur\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nsaboteur = saboteur:register\n"
    )


@pytest.mark.parametrize("process", ["run_scheduler_process", "run_detokenizer_process"])
def test_a_hook_failing_in_a_child_ends_the_server(
    process: str, server_settings: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """Hooks are checked in every process; the main one is tested in tests/sglang_plugin."""
    install_saboteur(tmp_path, process)
    python_path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    settings = {**server_settings("int4", 1), "PYTHONPATH": python_path.rstrip(os.pathsep)}
    server = Server(settings, tmp_path / "server.log")
    assert server.run_to_end() != 0, server.tail()
    errors = [line for line in server.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, server.tail()
    assert "ModelRunner.load_model (around)" in errors[0]


def test_kt_flags_without_weights_are_refused(
    server_settings: Callable[..., dict[str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    """Stock SGLang would serve, with every expert resident."""
    from kt_kernel.sglang_plugin import launch_environment

    command = [
        *(sys.executable, "-m", "sglang.launch_server", "--model", str(checkpoint)),
        *("--kt-cpuinfer", "2", "--kt-num-gpu-experts", "1", "--port", "1"),
    ]
    server = Server(launch_environment("cpu"), tmp_path / "server.log", command)
    assert server.run_to_end() == 2, server.tail()
    assert "\nerror: --kt-cpuinfer, --kt-num-gpu-experts given without --kt-weight-path" in (
        server.log.read_text()
    )
