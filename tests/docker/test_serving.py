"""``docker compose up`` on the tiny checkpoint: cold, asked, inspected, down, up again warm."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable

import httpx
import pytest

import kt_kernel
from tests.docker.project import Project, watched

MODEL = "DeepSeek-V3.2"
GRACE_SECONDS = 60


def question(stream: bool, tokens: int = 16) -> dict[str, object]:
    """A request whose answer has ``tokens`` tokens, however soon the model would end it."""
    return {
        "model": MODEL,
        "stream": stream,
        "max_tokens": tokens,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "hi"}],
    }


def test_each_stage_finished_before_the_next(stack: Project) -> None:
    states = stack.states()
    states.pop("prometheus", None)  # of other tests
    assert states == {
        "hub": "running",
        "preflight": "exited (0)",
        "download": "exited (0)",
        "convert": "exited (0)",
        "serve": "running",
        "status": "running",
    }


def test_the_status_service_told_the_truth_all_the_way(stack: Project) -> None:
    told = stack.told
    assert told[-1] == (200, "ready")
    assert {status for status, _ in told[:-1]} == {503}
    states = [state for _, state in told]
    assert "loading" in states
    assert [state for state in states if state.startswith("failed")] == []


def test_answers_a_chat_completion(stack: Project) -> None:
    with stack.api() as api:
        answer = api.post("/v1/chat/completions", json=question(False)).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 16


def test_streams_the_same_answer(stack: Project) -> None:
    greedy = {"temperature": 0}
    with stack.api() as api:
        whole = api.post("/v1/chat/completions", json=question(False) | greedy).json()
        pieces = []
        with api.stream("POST", "/v1/chat/completions", json=question(True) | greedy) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    pieces += [choice["delta"].get("content") or "" for choice in choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]


def test_health_tells_the_state(stack: Project) -> None:
    health = stack.container("serve").exec_run(["python", "/app/entrypoint.py", "health"])
    assert health.exit_code == 0
    assert health.output.decode().strip() == "ready"
    for stage in ("download", "convert"):
        assert "cannot write the state" not in stack.logs(stage)


def test_make_chat_asks_from_inside(stack: Project) -> None:
    chat = stack.with_files(KT_SMOKE_MAX_TOKENS="8").make("-s", "chat")
    assert chat.stdout.strip()
    # It asked as the containers were started; those of other tests may be among them.
    assert re.match(r'WITH="cpu( \w+)*", as', chat.stderr)


def test_make_ps_lists_the_stages(stack: Project) -> None:
    lines = stack.make("-s", "ps").stdout.splitlines()
    serve = next(line for line in lines if f"{stack.name}-serve-1" in line)
    assert "(healthy)" in serve
    assert any(f"{stack.name}-convert-1" in line and "Exited (0)" in line for line in lines)
    told = ["check: finished", "download: finished", "convert: finished", "serve: ready"]
    assert lines[-4:] == told


def test_a_router_before_a_server_of_another_host(
    stack: Project, project: Callable[..., Project]
) -> None:
    """Another project's server stands for the other host's; nothing answers at the second."""
    host = f"http://{stack.name}-serve-1"
    front = project("compose/replicas.yml", WORKER_URLS=f"{host}:{stack.port} {host}:9")
    front.port = stack.port + 5
    front.up("router")
    network = stack.client.networks.get(f"{stack.name}_default")
    network.connect(front.container("router").id)
    front.wait_until_healthy("router")
    assert front.states() == {"router": "running"}
    with front.api() as api:
        answer = api.post("/v1/chat/completions", json=question(False)).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"]


def test_serves_as_an_ordinary_user_on_a_read_only_root(stack: Project) -> None:
    container = stack.container("serve")
    host = container.attrs["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert not any(option.startswith("seccomp") for option in host["SecurityOpt"])
    status = dict(
        line.split(":\t", 1)
        for line in container.exec_run("cat /proc/1/status").output.decode().splitlines()
    )
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter: the engine's default profile
    for folder in ("/app", "/models", "/weights"):
        assert container.exec_run(f"touch {folder}/x").exit_code != 0


def test_may_place_memory_on_numa_nodes(stack: Project) -> None:
    code = (
        "import ctypes; libc = ctypes.CDLL('libc.so.6', use_errno=True);"
        "print(libc.syscall(238, 0, None, 0), ctypes.get_errno())"  # set_mempolicy(default)
    )
    answer = stack.container("serve").exec_run(["python", "-c", code]).output.decode()
    assert answer.split() == ["0", "0"]


def test_the_image_has_no_compiler_and_no_installer(stack: Project) -> None:
    code = (
        "import shutil, importlib.util;"
        "print([p for p in ('cc', 'gcc', 'g++', 'c++', 'clang', 'cmake', 'pip', 'pip3', 'uv')"
        " if shutil.which(p)], importlib.util.find_spec('pip'))"
    )
    container = stack.container("serve")
    assert container.exec_run(["python", "-c", code]).output.decode().strip() == "[] None"
    found = container.exec_run("find / -xdev -path /proc -prune -o -name '*.whl' -print")
    assert "wheels" not in found.output.decode()
    listing = container.exec_run("ls -A /root /var/lib/apt/lists").output.decode()
    assert ".cache" not in listing
    assert "_Packages" not in listing


def test_the_image_lists_the_licences_of_what_it_ships(stack: Project) -> None:
    lines = stack.container("serve").exec_run("cat /app/licences.txt").output.decode().splitlines()
    assert any(
        line.startswith(f"kt-kernel-stock-sglang {kt_kernel.__version__}: Apache-2.0; ")
        for line in lines
    )
    assert any(line.startswith("sglang ") for line in lines)
    # What apt installs in the build keeps its copyright file.
    (libnuma,) = [line for line in lines if line.startswith("libnuma1 ")]
    assert libnuma.endswith(": /usr/share/doc/libnuma1/copyright")
    # The bill of materials, for tools, has the same packages.
    content = stack.container("serve").exec_run("cat /app/sbom.json").output
    components = {part["name"] for part in json.loads(content)["components"]}
    assert {"kt-kernel-stock-sglang", "sglang", "libnuma1"} <= components


def test_what_was_pruned_is_not_missed(stack: Project) -> None:
    """The packages that docker/prune.py takes files from, as far as they load without a GPU."""
    code = "import cutlass.cute, pandas, pyarrow.dataset, scipy.stats, torch, triton.profiler"
    answer = stack.container("serve").exec_run(["python", "-c", code])
    assert answer.exit_code == 0, answer.output.decode()
    names = ("_cutlass_ir.cu12*", "libcupti_static.a", "libcusolverMg*")
    left = "find /opt/venv " + " -o ".join(f"-name '{name}'" for name in names)
    assert stack.container("serve").exec_run(["sh", "-c", left]).output == b""


def test_nothing_of_the_build_network_stays(
    stack: Project, build_variables: dict[str, str]
) -> None:
    image = stack.client.images.get(stack.variables["IMAGE"])
    labels = image.labels
    assert labels["org.opencontainers.image.title"]
    assert labels["org.opencontainers.image.version"] == kt_kernel.__version__
    assert re.match("[0-9a-f]{7,}", labels["org.opencontainers.image.revision"])
    configuration = json.dumps(image.attrs["Config"])
    assert build_variables["APT_MIRROR"] not in configuration
    found = stack.container("serve").exec_run(
        "ls /etc/pip.conf /run/secrets/pip_conf /run/secrets/ca_bundle /etc/apt/apt.conf.d/99build"
    )
    assert found.output.decode().count("No such file") >= 3
    # Nor do the folders that were mounted in a step.
    found = stack.container("status").exec_run("ls -d /wheels /opt/build /run/docker /run/secrets")
    assert found.output.decode().count("No such file") == 4


def test_make_down_and_up_again_goes_straight_to_serving(
    stack: Project, measured: list[str]
) -> None:
    before = {name: stack.digests(name) for name in ("models", "weights")}
    assert before["weights"]
    stack.make("down")
    assert stack.states() == {}
    started = time.monotonic()
    shown = stack.make("up-cpu").stdout.splitlines()
    assert shown[-1] == "ready"
    assert {name: stack.digests(name) for name in before} == before
    assert "downloading" not in stack.logs("download").lower()
    measured.append(f"warm up, until healthy: {time.monotonic() - started:.0f} s")
    with stack.api() as api:
        assert api.post("/v1/chat/completions", json=question(False)).status_code == 200


def test_a_typo_leaves_the_server_alone(stack: Project) -> None:
    before = stack.container("serve").id
    wrong = stack.with_files(KT_CPUINFER="many")
    with pytest.raises(AssertionError, match="error: KT_CPUINFER: expected an integer"):
        wrong.make("up", "WITH=cpu")
    assert stack.container("serve").id == before
    assert stack.status() == (200, "ready")


def test_comes_back_after_a_crash(stack: Project, measured: list[str]) -> None:
    started = time.monotonic()
    with watched(stack) as told:
        stack.crash("serve")
        stack.wait_until_restarted("serve")
        stack.wait_until_healthy()
    measured.append(f"crash: healthy again after {time.monotonic() - started:.0f} s")
    assert told[-1] == (200, "ready")
    assert (503, "loading") in told
    assert all(status == 503 for status, state in told if state != "ready")
    with stack.api() as api:
        assert api.post("/v1/chat/completions", json=question(False)).status_code == 200


def test_sigterm_ends_it_cleanly_with_a_request_in_flight(
    stack: Project, measured: list[str]
) -> None:
    outcome: list[str] = []

    def ask() -> None:
        try:
            with stack.api() as api:
                answer = api.post("/v1/chat/completions", json=question(False, tokens=200))
            outcome.append(f"answered with {answer.status_code}")
        except httpx.HTTPError as error:
            outcome.append(f"refused: {type(error).__name__}")

    request = threading.Thread(target=ask)
    request.start()
    time.sleep(1.0)
    started = time.monotonic()
    container = stack.container("serve")
    stack.compose("stop", "serve")
    took = time.monotonic() - started
    request.join(60)
    container.reload()
    measured.append(f"SIGTERM: ended after {took:.1f} s, the request in flight was {outcome}")
    assert outcome, "the request in flight was left hanging"
    assert took < GRACE_SECONDS
    assert container.attrs["State"]["ExitCode"] != 137, "killed: it did not end by itself"
    assert not container.attrs["State"]["OOMKilled"]
