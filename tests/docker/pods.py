"""Pods of rendered Kubernetes manifests, run by the Docker engine container by container.

What a kubelet would do with a pod: users, rights, volumes, variables, commands, limits, probes,
hooks and the order of its end come from the manifest. What makes pods, and networks between them,
is not tried: there is one network, in which a Service's name is its pod's.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.manifests import Container, Object, containers, of_kind
from tests.docker.engine import Engine

UNITS = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def quantity(text: str) -> float:
    """A quantity as Kubernetes writes it, as in 500m or 8Gi."""
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


@dataclass
class Pods:
    """The pods of some objects.

    Attributes:
        folder: for files of ConfigMaps and Secrets.
        secrets: Secrets that a user makes, by name: key and content.
        images: image of a manifest -> image of the engine.
    """

    engine: Engine
    name: str
    objects: tuple[Object, ...]
    folder: Path
    secrets: Mapping[str, Mapping[str, str]]
    images: Mapping[str, str]
    started: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def __enter__(self) -> Pods:
        self.engine.docker("network", "create", self.name)
        for claim in of_kind(self.objects, "PersistentVolumeClaim"):
            self._claim(claim["metadata"]["name"])
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:
            self.engine.docker("rm", "-f", "-v", *self.started, check=False)
        if self.volumes:
            self.engine.docker("volume", "rm", "-f", *self.volumes, check=False)
        self.engine.docker("network", "rm", self.name, check=False)

    def _volume(self, name: str, *options: str) -> str:
        name = f"{self.name}-{name}"
        if name not in self.volumes:
            self.engine.docker("volume", "create", *options, name)
            self.volumes.append(name)
        return name

    def _claim(self, name: str) -> str:
        """A disk, which the kubelet gives to the pod's fsGroup."""
        volume = self._volume(name)
        told = self.engine.docker("volume", "inspect", "-f", "{{.Mountpoint}}", volume).stdout
        disk = Path(told.strip())
        if not any(disk.iterdir()):
            os.chown(disk, 0, 10001)
            disk.chmod(0o2775)
        return volume

    def _mount(self, container: Container, pod: str, mount: Object) -> list[str]:
        volume, target = container.volume(mount), mount["mountPath"]
        read_only = ["readonly"] if mount.get("readOnly") else []
        if "configMap" in volume or "secret" in volume:
            source = self._files(pod, volume, container.pod["securityContext"].get("fsGroup", 0))
            parts = ["type=bind", f"source={source}", f"target={target}", *read_only]
        else:
            if "emptyDir" in volume:
                size = int(quantity(volume["emptyDir"]["sizeLimit"]))
                options = f"o=mode=2777,gid=10001,size={min(size, 2**30)}"
                tmpfs = ("-o", "type=tmpfs", "-o", "device=tmpfs", "-o", options)
                source = self._volume(f"{pod}-{volume['name']}", *tmpfs)
            else:
                name = volume["persistentVolumeClaim"].get("claimName")
                source = self._claim(name or f"{pod}-{volume['name']}")
            parts = ["type=volume", f"source={source}", f"target={target}", "volume-nocopy"]
            parts += read_only
        return ["--mount", ",".join(parts)]

    def _files(self, pod: str, volume: Object, group: int) -> str:
        """The folder of a ConfigMap or a Secret, with the rights that the kubelet gives."""
        folder = self.folder / pod / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            (found,) = (
                each
                for each in of_kind(self.objects, "ConfigMap")
                if each["metadata"]["name"] == volume["configMap"]["name"]
            )
            content: Mapping[str, str] = found["data"]
            mode = 0o644
        else:
            secret = volume["secret"]
            known = self.secrets[secret["secretName"]]
            wanted = secret.get("items") or [{"key": key, "path": key} for key in known]
            content = {item["path"]: known[item["key"]] for item in wanted}
            mode = secret["defaultMode"]
        for name, text in content.items():
            (folder / name).write_text(text)
            (folder / name).chmod(mode)
            os.chown(folder / name, 0, group)
        return str(folder)

    def start(self, kind: str, name: str, index: int = 0) -> None:
        """Start a pod of an object: its containers share network and processes."""
        first = ""
        for container in containers(self.objects):
            owner = container.owner
            if (owner["kind"], owner["metadata"]["name"]) != (kind, name):
                continue
            pod = f"{name}-{index}"
            place = ["--network", f"container:{first}", "--pid", f"container:{first}"]
            if not first:
                place = ["--network", self.name, "--init"]
                for service in of_kind(self.objects, "Service"):
                    if service["spec"]["selector"].items() <= container.labels.items():
                        place += ["--network-alias", service["metadata"]["name"]]
            own = self.container(pod, container.spec["name"])
            self.engine.docker(
                # A kubelet knows nothing of the image's own health check.
                *("run", "-d", "--no-healthcheck", "--name", own, *place),
                *self._rights(container),
                *self._environment(container, index),
                *(
                    w
                    for m in container.spec["volumeMounts"]
                    for w in self._mount(container, pod, m)
                ),
                *self._command(container),
            )
            self.started.append(own)
            first = first or own

    def container(self, pod: str, name: str) -> str:
        """Name of a container for the engine."""
        return f"{self.name}-{pod}-{name}"

    def _rights(self, container: Container) -> list[str]:
        pod, own = container.pod["securityContext"], container.spec["securityContext"]
        limits = container.spec["resources"]["limits"]
        words = ["--user", f"{pod['runAsUser']}:{pod['runAsGroup']}"]
        words += ["--group-add", str(pod["fsGroup"])] if "fsGroup" in pod else []
        words += ["--read-only"] if own["readOnlyRootFilesystem"] else []
        words += [] if own["allowPrivilegeEscalation"] else ["--security-opt=no-new-privileges"]
        words += [f"--cap-drop={each}" for each in own["capabilities"]["drop"]]
        words += [f"--cap-add={each}" for each in own["capabilities"].get("add", ())]
        cpus = min(quantity(limits["cpu"]), os.cpu_count() or 1)
        return [*words, f"--cpus={cpus:g}", f"--memory={int(quantity(limits['memory']))}"]

    def _environment(self, container: Container, index: int) -> list[str]:
        given = dict(container.environment)
        if container.owner["spec"].get("completionMode") == "Indexed":
            given["JOB_COMPLETION_INDEX"] = str(index)
        return [word for key, value in given.items() for word in ("-e", f"{key}={value}")]

    def _command(self, container: Container) -> list[str]:
        command: Sequence[str] = container.spec.get("command", [])
        entry = ["--entrypoint", command[0]] if command else []
        image = self.images[container.spec["image"]]
        return [*entry, image, *command[1:], *container.spec.get("args", [])]

    def exit_status(self, container: str, seconds: float = 240) -> int:
        """Of a container that is about to end."""
        return int(self.engine.docker("wait", container, timeout=seconds).stdout)

    def logs(self, container: str) -> str:
        """What a container has said."""
        told = self.engine.docker("logs", "--tail", "60", container, check=False)
        return told.stdout + told.stderr

    def probe(self, pod: str, container: Object, kind: str) -> str:
        """Ask once as the kubelet does; what is wrong, empty if nothing is."""
        probe: Mapping[str, Any] = container[kind]
        asked = probe.get("httpGet") or probe["tcpSocket"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        port = ports.get(asked["port"], asked["port"])
        first = next(own for own in self.started if own.startswith(f"{self.name}-{pod}-"))
        networks = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        address = self.engine.docker("inspect", "-f", networks, first).stdout.strip()
        try:
            if "httpGet" in probe:
                url = f"http://{address}:{port}{asked['path']}"
                answer = httpx.get(url, timeout=probe["timeoutSeconds"], trust_env=False)
                return "" if answer.status_code < 400 else answer.text.strip()
            socket.create_connection((address, port), probe["timeoutSeconds"]).close()
        except (OSError, httpx.TransportError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def wait_for_probe(
        self, pod: str, container: Object, kind: str, seconds: float, until: str = ""
    ) -> list[str]:
        """Ask until all is well, or until what is said has ``until`` in it; what was said.

        Args:
            seconds: how long at most.
        """
        deadline, told = time.monotonic() + seconds, list[str]()
        while wrong := self.probe(pod, container, kind):
            if wrong not in told[-1:]:
                told.append(wrong)
            if until and until in wrong:
                return told
            own = self.container(pod, container["name"])
            assert time.monotonic() < deadline, f"{told[-3:]}\n{self.logs(own)}"
            time.sleep(0.5)
        assert not until, f"not told before all was well: {until}"
        return told
