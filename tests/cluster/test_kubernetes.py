"""``cluster/kubernetes`` as it is rendered: valid, closed, and in step with the code.

No API server sees it here. ``tests/docker/test_kubernetes.py`` runs the containers of one overlay.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from benchmarks.server import REPOSITORY
from convert.layer_choice import LayerPart, parse_layers
from deploy.command_line import build_parser
from deploy.router.front import ROUTES as ROUTER
from deploy.settings.env_file import read_env_file
from deploy.settings.row import PREFIX
from deploy.settings.table import TABLE
from deploy.settings.variables import BY_NAME, is_known
from kt_kernel.sglang_plugin.edge.routes import SERVER, Role
from tests.cluster.get_kubectl import find
from tests.cluster.manifests import (
    KUBERNETES,
    OVERLAYS,
    STAGE_IMAGES,
    Container,
    Object,
    containers,
    named,
    of_kind,
    overlay,
    with_components,
)

pytestmark = pytest.mark.skipif(
    find() is None, reason="no kubectl with kustomize 5: python -m tests.cluster.get_kubectl"
)

#: The oldest that docs/clusters.md names, and the newest that is known.
VERSIONS = ("1.29", "1.37")
#: Of operators; the schemas of Kubernetes do not know them.
CUSTOM = ("ServiceMonitor", "ScaledObject")
COMPONENT = "app.kubernetes.io/component"
PREFILL_SECONDS = 40
DRAIN_SECONDS = 120


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return overlay(request.param)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_schemas_know_every_field(name: str) -> None:
    everything = (*overlay(name), *with_components(name))
    assert len({(o["kind"], o["metadata"]["name"]) for o in overlay(name)}) == len(overlay(name))
    for each in everything:
        if each["kind"] not in CUSTOM:
            for version in VERSIONS:
                kubernetes_validate.validate(each, version, strict=True)
        namespace = each["metadata"].get("namespace")
        assert namespace == (None if each["kind"] == "Namespace" else "deepseek-v32")


def test_all_optional_components_are_named_by_an_overlay() -> None:
    kinds = {o["kind"] for name in OVERLAYS for o in with_components(name)}
    assert kinds >= set(CUSTOM)
    text = "".join(
        (KUBERNETES / "overlays" / name / "kustomization.yaml").read_text() for name in OVERLAYS
    )
    for path in (KUBERNETES / "components").iterdir():
        assert f"- ../../components/{path.name}\n" in text


def test_containers_have_no_rights_and_limits(objects: tuple[Object, ...]) -> None:
    """What Kubernetes' standard `restricted` asks, and more; SYS_NICE needs a laxer namespace."""
    namespace = named(objects, "Namespace", "deepseek-v32")
    standard = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    added = set()
    for each in containers(objects):
        pod, own = each.pod["securityContext"], each.spec["securityContext"]
        assert pod["runAsNonRoot"] is True, each.name
        assert (pod["runAsUser"], pod["runAsGroup"]) == (10001, 10001), each.name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, each.name
        assert each.pod["automountServiceAccountToken"] is False, each.name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & each.pod.keys(), each.name
        assert own["allowPrivilegeEscalation"] is False, each.name
        assert own["readOnlyRootFilesystem"] is True, each.name
        assert own["capabilities"]["drop"] == ["ALL"], each.name
        added |= set(own["capabilities"].get("add", ()))
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= each.spec["resources"][kind].keys(), each.name
        assert re.search(r":(?!latest$)[\w.-]+$", each.spec["image"]), each.name
        # Else every Service would be a variable, and some a setting that nobody knows.
        assert each.pod["enableServiceLinks"] is False, each.name
        # The first process ignores SIGTERM unless it says otherwise.
        assert each.pod["shareProcessNamespace"] is True, each.name
        for volume in each.pod["volumes"]:
            assert not volume.keys() & {"hostPath"}, each.name
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], each.name
    assert (standard, added) in (("restricted", set()), ("privileged", {"SYS_NICE"}))


def test_a_server_gets_cpus_of_its_own_where_the_kubelet_gives_them() -> None:
    for name in ("one-host", "replicas"):
        for each in containers(overlay(name)):
            if each.owner["kind"] == "StatefulSet":
                resources = each.spec["resources"]
                assert resources["requests"] == resources["limits"], each.name
                if each.spec["name"] == "serve":
                    assert int(resources["limits"]["cpu"]) > 1
                    assert resources["limits"]["nvidia.com/gpu"] == "1"
    for each in containers(overlay("cpu-demo")):
        assert "nvidia.com/gpu" not in str(each.spec["resources"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_are_where_they_are_read(name: str) -> None:
    allowed = {
        "serve": {"keys/*"},
        "download": {"hub-token/*"},
        "router": {"keys/api-key", "keys/admin-key"},
        "smoke": {"keys/api-key"},
    }
    seen = set()
    for each in containers(with_components(name)):
        for mount in each.spec.get("volumeMounts", ()):
            if secret := each.volume(mount).get("secret"):
                keys = [item["key"] for item in secret.get("items", ())] or ["*"]
                found = {f"{secret['secretName']}/{key}" for key in keys}
                assert found <= allowed.get(each.spec["name"], set()), each.name
                assert mount["readOnly"] is True
                assert secret["defaultMode"] == 0o440
                seen |= found
                files = [v for k, v in each.environment.items() if k.endswith("_FILE")]
                assert files, each.name
                assert all(Path(file).parent == Path(mount["mountPath"]) for file in files)
        assert "valueFrom" not in str(each.spec.get("env")), "secrets are files"
    assert "keys/*" in seen


def test_what_may_hold_a_password_has_a_place_apart(objects: tuple[Object, ...]) -> None:
    """The settings' file is in every pod; a stage's Secret is in this one only, if there is one."""
    own: dict[str, list[Object]] = {}
    given: dict[str, set[str]] = {}
    for each in containers(objects):
        own[each.spec["name"]] = each.spec.get("envFrom", [])
        given[each.spec["name"]] = set(each.environment)
    for name, sources in own.items():
        secret = {"secretRef": {"name": f"{name}-settings", "optional": True}}
        assert sources == ([secret] if name in ("download", "serve") else []), name
    private = {s.name: set(s.stages) for s in TABLE if s.secret or s.private}
    private |= {"HTTPS_PROXY": {"download"}}
    for setting, readers in private.items():
        assert is_known(setting)
        for stage in readers & {"download", "convert", "serve", "status"}:
            assert own[stage] or setting in given[stage], (stage, setting)


def test_variables_and_the_settings_file_are_settings(
    objects: tuple[Object, ...], tmp_path: Path
) -> None:
    ((file, text),) = named(objects, "ConfigMap", "settings")["data"].items()
    (tmp_path / file).write_text(text)
    given = {line.name for line in read_env_file(tmp_path / file)}
    assert all(is_known(setting) for setting in given)
    for each in containers(objects):
        for variable in each.environment:
            ours = variable.startswith((PREFIX, "HF_"))
            assert is_known(variable) if ours else variable in ("PARTS", "WORKER_URLS"), each.name


def test_the_settings_file_arrives_as_it_is() -> None:
    """The very files of Compose and Slurm: comments, quotes, variables."""
    for name in OVERLAYS:
        written = (KUBERNETES / "overlays" / name / "settings.env").read_text()
        assert named(overlay(name), "ConfigMap", "settings")["data"] == {"settings.env": written}


def stages(objects: tuple[Object, ...]) -> list[Container]:
    """The containers that run a stage."""
    return [c for c in containers(objects) if c.spec["image"].split(":")[0] in STAGE_IMAGES]


def words_of(container: Container, environment: dict[str, str] | None = None) -> list[str]:
    """What entrypoint.py gets, with ``python`` replaced by a program that prints it."""
    if "command" not in container.spec:
        return list(container.spec["args"])
    shell = [*container.spec["command"], *container.spec["args"]]
    script = 'python() { echo "$KT_CONVERT_LAYERS $*"; }; '
    # A function cannot be what `exec` starts.
    words = [*shell[:-1], script + shell[-1].replace("exec python", "python")]
    told = subprocess.run(
        words, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=True
    ).stdout.split()
    assert told[1] == "/app/entrypoint.py"
    return [told[0], *told[2:]]


def test_commands_are_those_of_the_program(objects: tuple[Object, ...]) -> None:
    found = {}
    for each in stages(objects):
        words = words_of(each, {"JOB_COMPLETION_INDEX": "0", "PARTS": "1"})
        args = build_parser().parse_args(words[1:] if "command" in each.spec else words)
        assert args.first_env_file == [Path("/settings/settings.env")]
        found[each.spec["name"]] = args
    assert {args.stage for args in found.values()} >= {"download", "convert", "serve", "status"}
    assert all(found[name].wait for name in ("convert", "serve"))


def test_the_parts_of_the_conversion_are_the_whole(objects: tuple[Object, ...]) -> None:
    (convert,) = (each for each in stages(objects) if each.spec["name"] == "convert")
    job = convert.owner["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    layers = range(3, 61)
    seen: list[int] = []
    for index in range(job["completions"]):
        words = words_of(convert, {**convert.environment, "JOB_COMPLETION_INDEX": str(index)})
        part = parse_layers(words[0])
        assert isinstance(part, LayerPart)
        seen += part.of(layers)
    assert sorted(seen) == list(layers)


def test_probes_ask_what_is_served(objects: tuple[Object, ...]) -> None:
    default = {name: int(BY_NAME[name].default) for name in ("KT_PORT", "KT_STATUS_PORT")}
    for each in containers(objects):
        ports = {port["name"]: port["containerPort"] for port in each.spec.get("ports", ())}
        all_ports = {p["containerPort"] for c in each.pod["containers"] for p in c.get("ports", ())}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            if (probe := each.spec.get(kind)) is None:
                continue
            asked = probe.get("httpGet") or probe["tcpSocket"]
            # A name is looked up in the container itself only.
            port = ports[asked["port"]] if isinstance(asked["port"], str) else asked["port"]
            assert port in all_ports
            served = {"serve": SERVER, "router": ROUTER}.get(each.labels[COMPONENT])
            if served is None or "path" not in asked:
                continue
            if port == default["KT_PORT"]:
                assert served.routes[asked["path"]]["GET"] is Role.ANYONE
            else:
                assert (port, asked["path"]) == (default["KT_STATUS_PORT"], "/health")
        if each.spec["name"] in ("serve", "status"):
            given = {k: int(v) for k, v in each.environment.items() if k in default}
            assert given.items() <= default.items()
            assert all_ports == set(default.values())


def test_hours_to_start_and_minutes_to_end(objects: tuple[Object, ...]) -> None:
    (serve,) = (each for each in stages(objects) if each.spec["name"] == "serve")

    def seconds(kind: str) -> int:
        probe = serve.spec[kind]
        return int(probe["periodSeconds"] * probe["failureThreshold"])

    assert seconds("startupProbe") >= 12 * 3600
    assert seconds("livenessProbe") >= 3 * PREFILL_SECONDS
    for each in containers(objects):
        if hook := each.spec.get("lifecycle"):
            before = int(hook["preStop"]["exec"]["command"][1])
            assert each.pod["terminationGracePeriodSeconds"] >= before + DRAIN_SECONDS


def test_volumes_are_where_the_image_expects_them(objects: tuple[Object, ...]) -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    made = set(re.findall(r"(/\S+)", " ".join(re.findall(r"install -d .*", dockerfile))))
    assert made == {"/models", "/weights", "/cache", "/run/kt"}
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    readers = {"convert": {"/models"}, "serve": {"/models", "/weights"}, "status": {"/run/kt"}}
    for each in containers(objects):
        mounts = each.spec["volumeMounts"]
        for mount in mounts:
            volume = each.volume(mount)
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in claims
            if "configMap" in volume or "secret" in volume:
                continue
            assert mount["mountPath"] in made | {"/tmp", "/dev/shm"}, each.name
        only_read = {m["mountPath"] for m in mounts if m.get("readOnly")} & made
        assert only_read == readers.get(each.spec["name"], set()), each.name
        mounted = {m["name"] for c in each.pod["containers"] for m in c["volumeMounts"]}
        assert mounted >= {volume["name"] for volume in each.pod["volumes"]}, each.name


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector chooses a pod."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", ())
    )


def test_selectors_find_pods(objects: tuple[Object, ...]) -> None:
    pods = {each.owner["metadata"]["name"]: each for each in containers(objects)}
    for owner in of_kind(objects, "StatefulSet", "Deployment"):
        assert matches(owner["spec"]["selector"], owner["spec"]["template"]["metadata"]["labels"])
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert any(matches(budget["spec"]["selector"], dict(pod.labels)) for pod in pods.values())
    for service in of_kind(objects, "Service"):
        found = [
            p for p in pods.values() if service["spec"]["selector"].items() <= p.labels.items()
        ]
        assert len(found) == 1, service
        names = {p["name"] for c in found[0].pod["containers"] for p in c.get("ports", ())}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    servers = named(objects, "StatefulSet", "serve")["spec"]["serviceName"]
    assert named(objects, "Service", servers)["spec"]["clusterIP"] == "None"


def test_the_network_is_closed_but_for_what_is_asked(objects: tuple[Object, ...]) -> None:
    policies = of_kind(objects, "NetworkPolicy")
    closed = named(objects, "NetworkPolicy", "closed")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    opened: dict[str, set[tuple[int, bool]]] = {}
    leaves: dict[str, set[int]] = {}
    for each in containers(objects):
        component = each.labels[COMPONENT]
        for policy in policies:
            spec = policy["spec"]
            if not matches(spec["podSelector"], dict(each.labels)):
                continue
            for rule in spec.get("ingress", ()):
                outside = any("namespaceSelector" in source for source in rule["from"])
                ports = {(port["port"], outside) for port in rule["ports"]}
                opened[component] = opened.get(component, set()) | ports
            for rule in spec.get("egress", ()):
                leaves[component] = leaves.get(component, set()) | {
                    p["port"] for p in rule["ports"]
                }
    within, without = {(30000, False), (30001, False)}, {(30000, True)}
    has_router = "router" in {each.spec["name"] for each in containers(objects)}
    assert opened["serve"] == (within if has_router else within | without)
    if has_router:
        assert opened.pop("router") == without
    assert opened.keys() <= {"serve", "hub"}
    # Only the download leaves the cluster; a server asks nobody.
    assert 443 in leaves.pop("download")
    assert leaves.keys() <= {"router", "smoke"}
    assert all(ports == {53, 30000} for ports in leaves.values())


def test_the_router_knows_all_servers() -> None:
    plain, scaled = overlay("replicas"), with_components("replicas")
    serve = named(plain, "StatefulSet", "serve")["spec"]
    most = named(scaled, "ScaledObject", "serve")["spec"]["maxReplicaCount"]
    for objects, count in ((plain, serve["replicas"]), (scaled, most)):
        (router,) = (each for each in containers(objects) if each.spec["name"] == "router")
        assert router.environment["WORKER_URLS"].split() == [
            f"http://serve-{number}.{serve['serviceName']}:30000" for number in range(count)
        ]
    assert 1 < serve["replicas"] <= most
