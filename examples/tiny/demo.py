"""The whole pipeline on the tiny checkpoint: ``make demo``, or ``python -m examples.tiny.demo``.

Serves the trained checkpoint from a local Hub, then runs the deployment's own stages one by one,
as separate processes and with nothing but environment variables: download, convert, serve (stock
SGLang on the CPU) and smoke (the tutorial's question). Then it asks three questions, and fails
where an answer is wrong. Nothing is left running. What is done stays in the work folder, and a
second run uses it.
"""

from __future__ import annotations

from kt_kernel.program import run_program

if __name__ == "__main__":  # before the imports below, which take a while
    run_program("examples.tiny.demo:main")

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from convert.quantize import quantizer_settings
from deploy.settings.row import AUTO
from deploy.settings.variables import BY_NAME
from deploy.state import read_state, run_directory
from examples.tiny.hub import Hub
from examples.tiny.trained import copy_checkpoint
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import read_fields
from kt_kernel.host.addresses import free_port
from kt_kernel.packed import MANIFEST_NAME

REPO_ID = "deepseek-ai/DeepSeek-V3.2-tiny"
ENTRYPOINT = Path(__file__).resolve().parents[2] / "entrypoint.py"
START_TIMEOUT = 600  # seconds; half a minute is usual, a busy machine may take minutes
STOP_TIMEOUT = 30
TELL_SECONDS = 15.0  # between lines about a server that loads

QUESTIONS = {
    "What is 602 - 148?": "454",
    "What is the default of KT_PORT?": BY_NAME["KT_PORT"].default,
    "Reverse: sun moon star": "star moon sun",
}
"""What the trained checkpoint is asked, and the right answers. The difference is held out."""


class DemoError(Exception):
    """A stage failed; the message says which and where to look."""


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def stage_environment(settings: dict[str, str]) -> dict[str, str]:
    """The environment of a stage with these settings; all others have the tutorial's values."""
    # KT_* of the caller's shell are for a real host, and would be mixed in.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KT_") or k == "KT_TARGET"}
    return kept | settings


def settings(work: Path, hub: str, port: int) -> dict[str, str]:
    """The environment of all stages of the demo."""
    demo = {
        "HF_ENDPOINT": hub,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "KT_MODEL_ID": REPO_ID,
        "KT_MODEL_PATH": str(work / "models" / "DeepSeek-V3.2-tiny"),
        "KT_WEIGHT_PATH": str(work / "weights" / "DeepSeek-V3.2-tiny-INT4"),
        "KT_RUN_DIR": str(work / "run"),  # a real deployment of this host may have the usual one
        "KT_DEVICE": "cpu",
        "KT_HOST": "127.0.0.1",
        "KT_PORT": str(port),
        "KT_SMOKE_MAX_TOKENS": "48",
    }
    return stage_environment(demo)


def stage(name: str, environment: dict[str, str]) -> None:
    """Run one stage to its end, its output on ours."""
    say(f"python entrypoint.py {name}")
    result = subprocess.run([sys.executable, str(ENTRYPOINT), name], env=environment, check=False)
    if result.returncode != 0:
        raise DemoError(f"stage {name} ended with exit code {result.returncode}")


@contextmanager
def server(environment: dict[str, str], log: Path) -> Iterator[str]:
    """The serve stage as a background process group; yields its URL once it is healthy."""
    url = f"http://127.0.0.1:{environment['KT_PORT']}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ENTRYPOINT), "serve"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        states = run_directory(environment.get("KT_RUN_DIR", AUTO))
        wait_until_healthy(process, url, log, states)
        yield url
    finally:
        stop_group(process)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path, states: Path) -> None:
    """Wait for the server, and say now and then what the state file in ``states`` says of it."""
    started = told = time.monotonic()
    deadline = started + START_TIMEOUT
    with httpx.Client(timeout=30, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise DemoError(
                    f"the server ended with exit code {process.returncode}; the end of {log}:\n"
                    + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                )
            try:
                if client.get(f"{url}/health").is_success:
                    return
            except httpx.HTTPError:
                pass
            now = time.monotonic()
            if now - told >= TELL_SECONDS:
                state = read_state(states, "serve")
                phase = "starting" if state is None else state.line()
                print(f"{phase}, {now - started:.0f} s so far", flush=True)
                told = now
            time.sleep(0.5)
    raise DemoError(f"the server was not healthy after {START_TIMEOUT} s: see {log}")


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it started; SGLang's own shutdown first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline and group_alive(process):
            time.sleep(0.1)
    process.wait()


def group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps it, or it would count as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def what_ran(log: Path, weights: Path) -> str:
    """From the server's own log: target, threads and experts; from the disk: their bytes."""
    text = log.read_text(errors="replace")
    engine = re.search(r"kt_kernel: target (\S+), (\d+) threads", text)
    layers = re.findall(r"kt_kernel: layer (\d+): .*, (\d+) experts on the CPU", text)
    if engine is None or not layers:
        raise DemoError(f"{log} does not show that the experts ran in kt_kernel")
    size = sum(path.stat().st_size for path in weights.glob("layer-*.safetensors"))
    experts = sum(int(count) for _, count in layers)
    return (
        "attention: stock SGLang on the CPU\n"
        f"routed experts: kt_kernel, target {engine[1]}, {engine[2]} threads, {experts} experts in "
        f"{len(layers)} layers, {size / 1e6:.1f} MB packed"
    )


def remove_outdated(weights: Path) -> None:
    """Remove what an earlier version's quantiser made of the demo, which convert would refuse."""
    manifest = weights / MANIFEST_NAME
    if not manifest.is_file():
        return
    try:
        made_with = read_fields(manifest).texts("quantizer")
    except UserError:
        made_with = None
    if made_with != quantizer_settings("int4"):
        print(f"{weights} is of another version: making it again", flush=True)
        shutil.rmtree(weights)


def ask(url: str) -> None:
    """Ask ``QUESTIONS``, printing each answer as it comes.

    Raises:
        DemoError: an answer is not the right one.
    """
    # trust_env off: a proxy for the internet has no business between two local programs.
    with OpenAI(
        base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)
    ) as client:
        for question, expected in QUESTIONS.items():
            print(f"{question}\n  ", end="", flush=True)
            stream = client.chat.completions.create(
                model="DeepSeek-V3.2",
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=48,
                stream=True,
            )
            answer = ""
            for event in stream:
                for choice in event.choices:
                    print(choice.delta.content or "", end="", flush=True)
                    answer += choice.delta.content or ""
            print(flush=True)
            if answer != expected:
                raise DemoError(f"{question!r} was answered {answer!r}: expected {expected!r}")


def run(work: Path) -> None:
    """All stages in order.

    Raises:
        DemoError: a stage failed.
    """
    started = time.monotonic()
    repository = work / "hub" / REPO_ID
    say(f"tiny checkpoint in {repository}")
    print(f"{copy_checkpoint(repository) / 1e6:.1f} MB", flush=True)
    with Hub(work / "hub") as hub:
        environment = settings(work, hub.endpoint, free_port())
        stage("download", environment)
    remove_outdated(Path(environment["KT_WEIGHT_PATH"]))
    stage("convert", environment)
    log = work / "logs" / "serve.log"
    say(f"python entrypoint.py serve   (log: {log})")
    with server(environment, log) as url:
        print(f"ready at {url} after {time.monotonic() - started:.0f} s", flush=True)
        stage("smoke", environment)
        say("questions")
        ask(url)
    say("what ran where")
    print(what_ran(log, Path(environment["KT_WEIGHT_PATH"])))
    print(f"everything stopped; {time.monotonic() - started:.0f} s in all", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the question was answered, 1 when a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="work folder")
    args = parser.parse_args(argv)
    # SIGTERM must run the clean-up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(args.work.resolve())
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
