"""``cluster/slurm`` on a real Slurm: the tiny checkpoint, a killed task, a lost host."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.server import REPOSITORY
from examples.tiny.demo import REPO_ID
from examples.tiny.hub import Hub
from examples.tiny.trained import copy_checkpoint
from kt_kernel.host.addresses import free_port
from tests.cluster.conftest import Slurm

pytestmark = pytest.mark.cluster

SUBMIT = str(REPOSITORY / "cluster/slurm/submit")
KEY = "sk-cluster"


def test_download_convert_and_serve(slurm: Slurm, tmp_path: Path, measured: list[str]) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    copy_checkpoint(tmp_path / "hub" / REPO_ID)
    with Hub(tmp_path / "hub") as hub:
        (tmp_path / "tiny.env").write_text(
            f"HF_ENDPOINT={hub.endpoint}\n"
            f"KT_MODEL_ID={REPO_ID}\n"
            f"KT_MODEL_PATH={tmp_path}/model\n"
            f"KT_WEIGHT_PATH={tmp_path}/weights\n"
            f"KT_WEIGHT_CACHE={tmp_path}/local\n"
            f"KT_API_KEY_FILE={tmp_path}/key\n"
            "KT_DEVICE=cpu\n"
        )
        # Four parts for three hosts and three layers: one waits for a host, one has no layer.
        options = {"CONVERT_HOSTS": "4", "MEMORY": "4G", "GPUS": "0", "RUN": str(slurm.root)}
        options |= {"KT_PORT": str(free_port())}
        said = slurm.run(SUBMIT, str(tmp_path / "tiny.env"), **options)
        download, convert, finish, serve = re.findall(
            r"(?:download|convert|finish|serve) (\d+)", said
        )
        slurm.wait("the conversion", lambda: "RUNNING" in slurm.state(convert))
    assert slurm.state(download) == "COMPLETED"
    # A task is killed and begins again; a host goes away, and another one takes its task.
    slurm.run("scontrol", "requeue", f"{convert}_1")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.wait("the end of the conversion", lambda: slurm.state(finish) == "COMPLETED")
    assert slurm.state(convert) == "COMPLETED"

    endpoint = slurm.root / "endpoints" / serve
    slurm.wait("the server, ready", endpoint.exists, 600)
    url = re.sub("//[^:]+", "//127.0.0.1", endpoint.read_text().strip())
    assert answers(url)
    # One server, since all hosts are this machine and a second would find its port taken.
    router, port = start_router(slurm, tmp_path / "tiny.env")
    slurm.wait("an answer by the router", lambda: ask(f"http://127.0.0.1:{port}", KEY) == 200, 60)
    assert ask(f"http://127.0.0.1:{port}", "sk-other") == 401
    for job in (serve, router):
        slurm.run("scancel", "--signal=TERM", "--batch", job)
    alive = ("RUNNING", "COMPLETING")
    slurm.wait("the server's end", lambda: slurm.state(serve) not in alive)
    slurm.wait("the router's end", lambda: slurm.state(router) not in alive)
    assert not endpoint.exists()
    assert not (slurm.root / "endpoints.router").exists()
    measured.append(f"Slurm: {slurm.state(serve)} after SIGTERM")


def start_router(slurm: Slurm, settings: Path) -> tuple[str, int]:
    """Number and port of a router's job, as ``submit`` starts it from two servers on."""
    port = free_port()
    job = slurm.run(
        *("sbatch", "--parsable", f"--chdir={REPOSITORY}"),
        f"--output={slurm.root}/logs/router.log",
        str(REPOSITORY / "cluster/slurm/router.sbatch"),
        PROJECT=str(REPOSITORY),
        SETTINGS=str(settings),
        ENDPOINTS=str(slurm.root / "endpoints"),
        ROUTER_PYTHON=sys.executable,
        ROUTER_PORT=str(port),
    )
    return job.strip(), port


def ask(url: str, key: str) -> int:
    """Status of a completion; 0 where nobody listens yet."""
    try:
        return httpx.post(
            f"{url}/v1/completions",
            json={"model": "DeepSeek-V3.2", "prompt": "What is 602 - 148?", "max_tokens": 4},
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
            trust_env=False,
        ).status_code
    except httpx.TransportError:
        return 0


def answers(url: str) -> bool:
    """Whether the server is there."""
    try:
        return httpx.get(f"{url}/health", timeout=20, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ([], {}, "error: expected a file of settings, found none: cluster/slurm/submit FILE.env"),
        (["/no.env"], {}, "error: /no.env: expected a file of settings, found none that can be"),
        (["{env}"], {"RUN_BY": "docker"}, "error: RUN_BY is docker, expected venv, apptainer or "),
        (["{env}"], {"RUN_BY": "pyxis"}, "error: RUN_BY=pyxis: expected IMAGE to name the image"),
        (["{env}"], {"REPLICAS": "two"}, "error: CONVERT_HOSTS=4 REPLICAS=two GPUS=1: expected "),
        (["{env}"], {}, "a.env:1: unknown setting KT_PROT: did you mean KT_PORT?"),
    ],
)
def test_mistakes_are_one_line(
    slurm: Slurm, tmp_path: Path, arguments: list[str], options: dict[str, str], error: str
) -> None:
    (tmp_path / "a.env").write_text("KT_PROT=1\n")
    words = [word.format(env=tmp_path / "a.env") for word in arguments]
    with pytest.raises(AssertionError) as failed:
        slurm.run(SUBMIT, *words, RUN=str(tmp_path), **options)
    found = str(failed.value).splitlines()[0]
    assert error in found


def test_what_no_host_can_run_is_not_half_submitted(slurm: Slurm, tmp_path: Path) -> None:
    """No host has the 341 GB that V3.2 needs."""
    (tmp_path / "v32.env").write_text(f"KT_MODEL_PATH={tmp_path}/model\n")
    with pytest.raises(AssertionError, match="Memory specification can not be satisfied"):
        slurm.run(SUBMIT, str(tmp_path / "v32.env"), RUN=str(tmp_path), GPUS="0")
    slurm.wait("an empty queue", lambda: slurm.run("squeue", "--noheader") == "", 30)
