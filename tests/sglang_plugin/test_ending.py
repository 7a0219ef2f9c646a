"""How a server ends, without one: what its processes do on signals, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kt_kernel.load_progress import PROGRESS_VARIABLE
from kt_kernel.server_phase import told_phase
from kt_kernel.sglang_plugin import ending


def test_only_a_warm_up_that_succeeded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "serve-layers.json"))
    name = "sglang.srt.entrypoints.http_server"
    server = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, server)
    for status, told in (("Starting", None), ("Up", "ready")):
        manager = SimpleNamespace(server_status=SimpleNamespace(name=status))
        monkeypatch.setattr(
            server, "_global_state", SimpleNamespace(tokenizer_manager=manager), raising=False
        )
        ending.tell_ready(None)
        assert told_phase(tmp_path) == told
    ending.tell_ending(object())
    assert told_phase(tmp_path) == "ending"


def run_program(folder: Path, text: str, *words: str) -> subprocess.Popen[str]:
    """A program whose children are spawned as SGLang's are: each imports its text again."""
    (folder / "program.py").write_text("import os, signal, sys, time\n" + text)
    return subprocess.Popen(
        [sys.executable, folder / "program.py", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


START = """
from multiprocessing import get_context
from kt_kernel.sglang_plugin.ending import prepare_end
if __name__ == "__main__":
    prepare_end()
    get_context("spawn").Process(target=child).start()
    time.sleep(60)
"""


def test_a_child_ends_whose_parent_died_while_it_imported(tmp_path: Path) -> None:
    """Fails when it asks the kernel to be told of an end that is over: it stays for ever."""
    code = """
if __name__ == "__mp_main__":
    print("importing", flush=True)
    while os.getppid() == int(open(sys.argv[1]).read()):
        time.sleep(0.01)

def child():
    prepare_end()
    print("stays")
"""
    pid = tmp_path / "pid"
    write = f"if __name__ == '__main__': open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    program = run_program(tmp_path, write + code + START, str(pid))
    assert program.stdout is not None
    assert program.stdout.readline() == "importing\n"
    program.kill()
    assert program.stdout.read() == ""  # it ends when the child has ended, too
    program.wait()


def test_ctrl_c_while_it_loads_ends_all_without_a_traceback(tmp_path: Path) -> None:
    """To the whole group, as from a terminal, while the child imports."""
    code = """
if __name__ == "__mp_main__":
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    print("importing", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)

def child():
    prepare_end()
    print("stays")
"""
    program = run_program(tmp_path, code + START)
    assert program.communicate(timeout=60)[0] == "importing\n"
    assert program.returncode == -signal.SIGINT


def test_ctrl_c_ends_a_server_as_sigterm_does(tmp_path: Path) -> None:
    """The requests under way are finished; a second one does not wait for them."""
    code = """
import asyncio
from types import SimpleNamespace
from kt_kernel.sglang_plugin.ending import end_like_terminate

async def serve():
    handler = SimpleNamespace(sigterm_handler=lambda: print("draining", flush=True))
    manager = SimpleNamespace(
        event_loop=asyncio.get_running_loop(), signal_handler_class=lambda manager: handler
    )
    for _ in range(3):  # SGLang calls it with each request
        end_like_terminate(None, manager)
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(0.1)
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(60)

asyncio.run(serve())
"""
    program = run_program(tmp_path, code)
    assert program.communicate(timeout=60)[0] == "draining\ngoes on\n"
    assert program.returncode == -signal.SIGINT
