"""The overlay ``cpu-demo`` of ``cluster/kubernetes``, its containers run by the engine."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.cluster.get_kubectl import find
from tests.cluster.manifests import named, overlay
from tests.docker.engine import Engine
from tests.docker.pods import Pods
from tests.docker.project import READY_SECONDS

KEYS = {"api-key": "sk-users", "admin-key": "sk-admin"}


@pytest.mark.skipif(find() is None, reason="no kubectl: python -m tests.cluster.get_kubectl")
def test_all_pods_at_once_come_to_an_answer(
    engine: Engine, images: dict[str, str], tmp_path: Path, measured: list[str]
) -> None:
    """As after `kubectl apply`: each waits for the one before; two parts; probes; the end."""
    started = time.monotonic()
    objects = overlay("cpu-demo")
    names = {"deepseek-v32-cpu": "IMAGE", "deepseek-v32-demo": "DEMO_IMAGE"}
    own = {f"{name}:local": images[variable] for name, variable in names.items()}
    parts = named(objects, "Job", "convert")["spec"]["completions"]
    assert parts == 2
    with Pods(engine, "kubernetes", objects, tmp_path, {"keys": KEYS}, own) as pods:
        pods.start("StatefulSet", "serve")
        for index in range(parts):
            pods.start("Job", "convert", index)
        pod = named(objects, "StatefulSet", "serve")["spec"]["template"]["spec"]
        serve, status = pod["containers"]
        pods.wait_for_probe("serve-0", status, "livenessProbe", 120)
        waits = "serve waits for convert"
        pods.wait_for_probe("serve-0", serve, "startupProbe", 120, until=waits)
        pods.start("Deployment", "hub")
        pods.start("Job", "download")
        jobs = [("download-0", "download")]
        jobs += [(f"convert-{index}", "convert") for index in range(parts)]
        for job, name in jobs:
            container = pods.container(job, name)
            assert pods.exit_status(container) == 0, pods.logs(container)
        told = pods.wait_for_probe("serve-0", serve, "startupProbe", READY_SECONDS)
        assert all('"healthy": false' in line for line in told if line.startswith("{"))
        for kind in ("livenessProbe", "readinessProbe"):
            assert pods.probe("serve-0", serve, kind) == ""
        measured.append(f"Kubernetes' pods: ready after {time.monotonic() - started:.0f} s")

        # It answers while the hook before its end runs, and ends by itself within its time.
        server = pods.container("serve-0", "serve")
        hook = serve["lifecycle"]["preStop"]["exec"]["command"]
        before = threading.Thread(target=engine.docker, args=("exec", server, *hook))
        began = time.monotonic()
        before.start()
        pods.start("Job", "smoke")
        client = pods.container("smoke-0", "smoke")
        assert pods.exit_status(client) == 0, pods.logs(client)
        before.join()
        grace = pod["terminationGracePeriodSeconds"] - (time.monotonic() - began)
        engine.docker("stop", "--time", f"{grace:.0f}", server, timeout=200)
        assert pods.exit_status(server) != 137, "killed: it did not end by itself"
        measured.append(f"Kubernetes' pods: {time.monotonic() - started:.0f} s in all")
