"""The manifests of ``cluster/kubernetes`` as kubectl renders them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.server import REPOSITORY
from tests.cluster.get_kubectl import find

KUBERNETES = REPOSITORY / "cluster/kubernetes"
OVERLAYS = ("one-host", "replicas", "cpu-demo")
STAGE_IMAGES = ("deepseek-v32", "deepseek-v32-cpu")

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Container:
    """A container of a pod, with the pod's spec and labels, and what makes the pod."""

    owner: Object
    pod: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}/{self.spec['name']}"

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: entry["value"] for entry in self.spec.get("env", ())}

    def volume(self, mount: Object) -> Object:
        """The volume of a mount; one of a claim's template as that of a claim."""
        found: list[Object] = [v for v in self.pod["volumes"] if v["name"] == mount["name"]]
        for claim in self.owner["spec"].get("volumeClaimTemplates", ()):
            if claim["metadata"]["name"] == mount["name"]:
                found.append({"name": mount["name"], "persistentVolumeClaim": {}})
        assert len(found) == 1, f"{self.name}: {mount['name']} is {len(found)} volumes"
        return found[0]


@cache
def render(folder: Path) -> tuple[Object, ...]:
    """The objects of a folder with a kustomization."""
    kubectl = find()
    assert kubectl is not None
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    """The objects of an overlay."""
    return render(KUBERNETES / "overlays" / name)


@cache
def with_components(name: str) -> tuple[Object, ...]:
    """An overlay with every component that its kustomization names, in comments too."""
    own = (KUBERNETES / "overlays" / name / "kustomization.yaml").read_text()
    left_out = re.findall(r"^  # - ../../(components/[\w-]+)$", own, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.relpath(KUBERNETES, Path(folder).resolve())
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "deepseek-v32",
            "resources": [f"{base}/overlays/{name}"],
            "components": [f"{base}/{each}" for each in left_out],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return render(Path(folder))


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    """Those of some kinds."""
    return [each for each in objects if each["kind"] in kinds]


def named(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    """One object."""
    (found,) = (each for each in of_kind(objects, kind) if each["metadata"]["name"] == name)
    return found


def containers(objects: tuple[Object, ...]) -> Iterator[Container]:
    """All containers of all pods."""
    for owner in of_kind(objects, "Job", "StatefulSet", "Deployment"):
        template = owner["spec"]["template"]
        assert not template["spec"].get("initContainers")
        for spec in template["spec"]["containers"]:
            yield Container(owner, template["spec"], template["metadata"]["labels"], spec)
