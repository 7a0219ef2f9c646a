"""``cluster/podman``: the units are the services of docker-compose.yml, and systemd takes them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from itertools import pairwise
from pathlib import Path

import pytest

from tests.compose.files import REPOSITORY, services
from tests.docker.engine import EngineUnavailable, run, unpack_trixie

UNITS = REPOSITORY / "cluster/podman"
STAGES = ("preflight", "download", "convert", "serve", "status")
#: Read by the stages themselves, from the file of settings.
SETTINGS = "--env-file /run/settings.env "


class Unit:
    """A unit file's keys, each with all that it was given."""

    def __init__(self, name: str) -> None:
        self.text = (UNITS / f"deepseek-v32-{name}.container").read_text()

    def all(self, key: str) -> list[str]:
        return re.findall(rf"^{key}=(.*)$", self.text, re.MULTILINE)

    def one(self, key: str) -> str:
        (value,) = self.all(key)
        return value


def seconds(text: str) -> int:
    """Of a duration with its unit, which is seconds, or of compose's ``${NAME:-120s}``."""
    found = re.search(r"(\d+)s", text)
    assert found, text
    return int(found[1])


def plain(text: str) -> str:
    """A word of compose, with the default of what compose's variables stand for."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", STAGES)
def test_a_unit_is_the_service_of_compose(name: str) -> None:
    """Whoever changes a service there changes the unit, too."""
    unit, service = Unit(name), services()[name]
    assert unit.one("Exec") == SETTINGS + " ".join(service["command"])
    assert f"{unit.one('User')}:{unit.one('Group')}" == plain(service["user"])
    assert unit.one("Image") == "localhost/" + plain(service["image"])
    assert [service["init"], service["read_only"]] == [True, True]
    assert [unit.one("RunInit"), unit.one("ReadOnly")] == ["true", "true"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert unit.one("NoNewPrivileges") == "true"
    assert [word.lower() for word in unit.all("DropCapability")] == ["all"]
    assert service["cap_drop"] == ["ALL"]
    capabilities = [f"CAP_{capability}" for capability in service.get("cap_add", [])]
    assert unit.all("AddCapability") == capabilities
    assert unit.all("Tmpfs") == service["tmpfs"]
    limits = service.get("ulimits", {})
    assert [f"memlock={value}" for value in limits.values()] == [
        "memlock=${MEMLOCK:--1}" for _ in unit.all("Ulimit")
    ]
    shared = service.get("shm_size", "")
    assert [plain(shared)] * bool(shared) == [
        default_of(unit, "SHM_SIZE") for _ in unit.all("ShmSize")
    ]
    assert ("deploy" in service) == (unit.all("AddDevice") == ["nvidia.com/gpu=all"])
    assert unit.one("PodmanArgs") == f"--network-alias={name}"


def default_of(unit: Unit, name: str) -> str:
    """What a variable of [Service] is unless a file says otherwise."""
    found = dict(word.split("=", 1) for line in unit.all("Environment") for word in line.split())
    return found[name]


@pytest.mark.parametrize("name", STAGES)
def test_a_unit_has_the_volumes_and_ports_of_compose(name: str) -> None:
    unit, service = Unit(name), services()[name]
    mounts = [
        re.sub(r"^\$\{(\w+):-\w+\}", r"${\1}", volume) for volume in service.get("volumes", [])
    ]
    mounts = [re.sub("^run:", "deepseek-v32-run.volume:", volume) for volume in mounts]
    own = f"%E/deepseek-v32/{name}.env"
    assert unit.all("Volume") == [*mounts, f"{own}:/run/settings.env:ro,z"]
    # Podman hands proxies on that it has itself.
    assert unit.all("EnvironmentFile") == [own, "-%E/deepseek-v32/podman.env"]
    ports = [re.sub(r":-[\w.]+\}", "}", port) for port in service.get("ports", [])]
    assert unit.all("PublishPort") == ports
    assert default_of(unit, "KT_PORT") == "30000"
    assert default_of(unit, "KT_PUBLISHED_HOST") == "${KT_HOST}"
    # The one of the container first, the one of the host for ${KT_HOST} after it.
    assert re.findall(r"KT_HOST=(\S+)", unit.text) == ["0.0.0.0", "127.0.0.1"]


@pytest.mark.parametrize("name", ["download", "convert", "serve"])
def test_a_stage_begins_and_ends_as_with_compose(name: str) -> None:
    unit, service = Unit(name), services()[name]
    check = service["healthcheck"]
    assert unit.one("HealthCmd").replace('"', "").strip("[]").split(",") == check["test"][1:]
    assert unit.one("Restart") == "on-failure"
    assert service["restart"].removeprefix("${RESTART:-").startswith("on-failure:3")
    assert unit.one("StartLimitBurst") == "4"  # the first start, and three more
    grace = seconds(service["stop_grace_period"])
    assert unit.one("StopTimeout") == str(grace)
    # systemd would kill what podman still waits for.
    assert int(unit.one("TimeoutStopSec")) > grace
    # What a stage ends with after SIGTERM is no failure.
    assert unit.one("SuccessExitStatus") == "143"
    assert unit.one("Requires") == unit.one("After") == "deepseek-v32-preflight.service"
    if name == "serve":
        for key, value in (("HealthStartPeriod", "start_period"), ("HealthInterval", "interval")):
            assert unit.one(key) == plain(check[value])


def test_the_target_starts_all_and_fails_with_the_check() -> None:
    """`systemctl start` says so; a `Wants` of it would end well whatever the check found."""
    text = (UNITS / "deepseek-v32.target").read_text()
    started = re.findall(r"deepseek-v32-(\w+)\.service", text)
    assert set(started) == set(STAGES)
    assert "\nRequires=deepseek-v32-preflight.service\n" in text


@pytest.fixture(scope="module")
def quadlet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Podman's generator, out of trixie's package: bookworm's Podman has none yet."""
    try:
        unpacked = unpack_trixie(tmp_path_factory.mktemp("podman"), "podman")
    except EngineUnavailable as error:
        pytest.skip(f"no Podman 5: {error}")
    return unpacked / "usr/libexec/podman/quadlet"


def install(
    home: Path, settings: str, version: str = "5.4.2", **files: str
) -> subprocess.CompletedProcess[str]:
    """``cluster/podman/install`` for a user who has these files at home; Podman is pretended."""
    programs = home / "bin"
    programs.mkdir(parents=True)
    for name, said in (
        ("podman", f"podman version {version}"),
        ("systemctl", ""),
        ("id", "1000"),
    ):
        (programs / name).write_text(f"#!/bin/sh\necho {said}\n")
        (programs / name).chmod(0o755)
    for name, text in {**files, "settings.env": settings}.items():
        (home / name).write_text(text)
    return run(
        [str(UNITS / "install"), str(home / "settings.env")],
        {"HOME": str(home), "XDG_CONFIG_HOME": "", "PATH": f"{programs}:{os.environ['PATH']}"},
        check=False,
    )


@pytest.mark.cluster
def test_podman_and_systemd_take_the_installed_units(quadlet: Path, tmp_path: Path) -> None:
    """The real generator, with a key and without a card; four seconds with the download."""
    settings = f"KT_DEVICE=cpu\nKT_API_KEY_FILE={tmp_path}/home/key\n"
    done = install(tmp_path / "home", settings, key="secret\n")
    assert done.returncode == 0, done.stderr
    units = tmp_path / "units"
    units.mkdir()
    config = tmp_path / "home/.config"
    said = run(
        [str(quadlet), "--user", str(units)],
        {"QUADLET_UNIT_DIRS": str(config / "containers/systemd")},
    )
    assert [line for line in said.stderr.splitlines() if ": Loading source " not in line] == []
    starts = {name: start_of(units / f"deepseek-v32-{name}.service") for name in STAGES}
    key = "%E/deepseek-v32/KT_API_KEY:/run/keys/KT_API_KEY:ro,z"
    for name, words in starts.items():
        assert (key in words) == (name in ("preflight", "serve"))
        assert "--device" not in words
        tail = [*SETTINGS.split(), *services()[name]["command"]]
        assert words[-len(tail) :] == tail
    assert words_after(starts["serve"], "--publish") == ["${KT_HOST}:${KT_PORT}:${KT_PORT}"]

    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: install the package systemd")
    shutil.copy(config / "systemd/user/deepseek-v32.target", units)
    for unit in units.glob("*.service"):
        unit.write_text(unit.read_text().replace("/usr/bin/podman", "/bin/true"))
    told = run(
        ["systemd-analyze", "--user", "verify", *map(str, units.glob("deepseek-*"))],
        {"XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_UNIT_PATH": f"{units}:/usr/lib/systemd/user:"},
    )
    assert told.stdout + told.stderr == ""


def start_of(unit: Path) -> list[str]:
    parser = RawConfigParser(strict=False, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return shlex.split(parser["Service"]["ExecStart"])


def words_after(words: list[str], option: str) -> list[str]:
    return [after for word, after in pairwise(words) if word == option]


def test_the_installed_files_are_the_user_s_alone(tmp_path: Path) -> None:
    """The containers' users read them in a folder that no other user of the host enters."""
    home = tmp_path / "home"
    done = install(home, f"HF_TOKEN_FILE='{home}/token'\n", token="hf_secret\n")
    assert done.returncode == 0, done.stderr
    folder = home / ".config/deepseek-v32"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "HF_TOKEN").read_text() == "hf_secret\n"
    drop_ins = home / ".config/containers/systemd/deepseek-v32"
    assert [path.parent.name for path in drop_ins.glob("*.d/*.conf")] == [
        "deepseek-v32-download.container.d"
    ]


def test_a_stage_gets_no_secret_that_it_does_not_read(tmp_path: Path) -> None:
    """As with Compose, which gives it an empty one; whatever the settings' lines look like."""
    has = {name: services()[name]["environment"] for name in STAGES}
    taken_out = {name for given in has.values() for name, value in given.items() if value == ""}
    readers = {
        name: {stage for stage in STAGES if has[stage].get(name, "") != ""}
        for name in taken_out
        if not name.endswith("_FILE")
    }
    assert len(readers) > 10
    forms = ("{}={}", "  export {} = '{}'  # a comment", '#{}="{}"')
    lines = ["# Settings", "", "KT_PORT=30001"]
    for number, name in enumerate(sorted(readers)):
        lines.append(forms[number % len(forms)].format(name, f"secret-{name}-"))
    done = install(tmp_path, "\n".join([*lines, "KT_DEVICE=cpu", ""]))
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        file = tmp_path / f".config/deepseek-v32/{stage}.env"
        assert file.stat().st_mode & 0o777 == 0o644
        found = file.read_text().splitlines()
        # Messages name lines.
        assert len(found) == len(lines) + 1
        assert (found[2], found[-1]) == ("KT_PORT=30001", "KT_DEVICE=cpu")
        there = {name for name in readers if f"secret-{name}-" in file.read_text()}
        assert there == {name for name, stages in readers.items() if stage in stages}
    assert "secret" not in (tmp_path / ".config/deepseek-v32/convert.env").read_text()


def test_settings_with_signs_of_their_own_are_taken(tmp_path: Path) -> None:
    """What only looks like the forms that are refused: a dollar sign, comments, other settings."""
    settings = (
        "# Gr\xf6\xdfe: HTTPS_PROXY=${P}\nHF_TOKEN=a$$b\n"
        "KT_API_KEY= 'a$b'\n"
        'KT_ADMIN_KEY="a\\"b"\n'
        "HTTP_PROXY=http://h/\\\nA=1\nB=${A}\xe9\n#HTTPS_PROXY=${P}\n"
    )
    old = tmp_path / ".config/deepseek-v32/settings.env"
    old.parent.mkdir(parents=True)
    old.touch()
    done = install(tmp_path, settings)
    assert done.returncode == 0, done.stderr
    assert not old.exists()


@pytest.mark.parametrize(
    ("settings", "version", "error"),
    [
        ("A=1\nKT_API_KEY='sk-\nb'\n", "5.0.0", "settings.env:2: expected a value that ends on"),
        ('KT_API_KEY="sk-\\\nb"\n', "5.0.0", "settings.env:1: expected a value that ends on"),
        ("KT_API_KEY='sk\\'\nb'\n", "5.0.0", "settings.env:1: expected a value that ends on"),
        ('KT_API_KEY=\xa0"sk-\nb"\n', "5.0.0", "settings.env:1: expected a value that ends on"),
        ("\ufeffHF_TOKEN=hf\n", "5.0.0", "settings.env:1: expected ASCII up to the ="),
        ("# \xdc\n\xa0HF_TOKEN=hf\n", "5.0.0", "settings.env:2: expected ASCII up to the ="),
        ("export\xa0HF_TOKEN=hf\n", "5.0.0", "settings.env:1: expected ASCII up to the ="),
        ("P=http://u:pw@p\nHTTPS_PROXY=${P}\n", "5.0.0", "settings.env:2: expected the value"),
        ('P=pw\nHTTP_PROXY="http://u:$P@p"\n', "5.0.0", "settings.env:2: expected the value"),
        ("HF_ENDPOINT=http://h\nA=${HF_ENDPOINT}/x\n", "5.0.0", "settings.env:2: expected no var"),
        ("KT_API_KEY_FILE=/none", "5.0.0", "settings.env: KT_API_KEY_FILE: cannot read /none"),
        ("", "4.3.1", "podman is 4.3.1: expected 5.0 or later, whose units take drop-ins"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, settings: str, version: str, error: str
) -> None:
    done = install(tmp_path, settings, version)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert error in line
    assert not list(tmp_path.glob(".config/containers/systemd/*"))
    assert not list(tmp_path.glob(".config/containers/.*"))
