"""In which order the stages run, and what each is given."""

from __future__ import annotations

import pytest

from deploy.settings.table import TABLE
from deploy.settings.variables import BY_NAME, stages_of
from deploy.state import HOST, SERVERS
from tests.compose.files import REPOSITORY, services

_IN_CAPITALS = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY")
#: That may have a password in them.
PROXIES = (*_IN_CAPITALS, *map(str.lower, _IN_CAPITALS))


def test_after_the_check_all_stages_start_and_take_turns() -> None:
    """Nobody has to stay to start the next one; each waits for the one before by itself."""
    stages = services()
    checked = {"condition": "service_completed_successfully"}
    assert stages["preflight"]["command"] == ["check", "--first", "--tell"]
    for name in ("download", "convert", "serve"):
        assert stages[name]["depends_on"]["preflight"] == checked
        assert stages[name]["command"] == [name, "--in-turn"]


def test_status_sees_what_each_of_several_servers_does() -> None:
    """With states of their own, which nobody saw, all could fail and `make up` follow for ever."""
    plain, several = services(), services("compose/replicas.yml")
    run_dir = plain["serve"]["environment"]["KT_RUN_DIR"]
    assert several["serve"]["environment"]["KT_RUN_DIR"] == f"{run_dir}/{SERVERS}/{HOST}"
    assert several["serve"]["command"] == ["serve", "--in-turn", run_dir]
    assert f"run:{run_dir}" in plain["serve"]["volumes"]
    assert f"run:{run_dir}:ro" in plain["status"]["volumes"]
    assert several["serve"]["volumes"] == ["cpus:/run/kt-cpus"]


def test_proxies_and_keys_are_for_the_stages_that_read_them() -> None:
    names = {*_IN_CAPITALS, "NO_PROXY"}
    found = services()
    for name in ("preflight", "convert", "serve", "status", "client"):
        given = found[name]["environment"]
        assert not {key for key in given if key.upper() in names and given[key] != ""}
        assert found[name]["environment"]["HF_TOKEN"] == ""
    assert {key for key in found["download"]["environment"] if key.upper() in names} == {
        *names,
        *map(str.lower, names),
    }
    # The check before all looks at the server's keys.
    for name in ("download", "convert", "status"):
        assert found[name]["environment"]["KT_API_KEY"] == ""
    for name in ("download", "convert", "status", "client"):
        assert found[name]["environment"]["KT_ADMIN_KEY"] == ""


@pytest.mark.parametrize("name", [*(s.name for s in TABLE if s.secret or s.private), *PROXIES])
def test_what_may_hold_a_secret_is_for_the_stages_that_read_it(name: str) -> None:
    """All of .env goes in; an address with a password in it, too, was in every container.

    The check before all refuses a bad value, so it needs each of them: with an empty
    KT_STATUS_SERVER there, nobody did, and `make up` followed for ever.
    """
    readers = set(stages_of(name) or ())
    setting = BY_NAME.get(name)
    if setting is not None and (not setting.secret or "serve" in readers):
        readers.add("check")  # not the Hub's token, which can have any form
    run_by = {"preflight": "check", "client": "smoke"}
    having = {
        run_by.get(service, service)
        for service, keys in services().items()
        if keys["environment"][name] != ""
    }
    assert having == readers - {"bundle"}  # which runs on the host
    assert having


def test_ports_are_published_on_this_host_unless_an_address_is_set() -> None:
    """The check of keys looks at the same address."""
    found = services()
    for name in ("serve", "status"):
        (port,) = found[name]["ports"]
        assert port.startswith("${KT_HOST:-127.0.0.1}:")
        assert found[name]["environment"]["KT_PUBLISHED_HOST"] == "${KT_HOST:-127.0.0.1}"
    (port,) = services("compose/replicas.yml")["router"]["ports"]
    assert port.startswith("${KT_HOST:-127.0.0.1}:")


def test_podman_compose_takes_no_container_s_address_for_the_host_s() -> None:
    """It fills ``${KT_HOST}`` of the ports from the service's own ``environment``, too: with
    0.0.0.0 there the port was published on all addresses."""
    for service in [*services().values(), services("compose/replicas.yml")["router"]]:
        assert "KT_HOST" not in service["environment"]
        assert service["env_file"][-1] == {"path": "compose/container.env"}
    assert "KT_HOST=0.0.0.0" in (REPOSITORY / "compose/container.env").read_text().splitlines()


def test_podman_compose_can_merge_the_overrides() -> None:
    """It cannot merge a value into an empty one: what overrides fill is taken out before them."""
    plain, taken_out = services(), services("cluster/podman/compose.yml")
    for override in ("compose/cpu.yml", "compose/speciale.yml"):
        for name, service in services(override).items():
            values = service.get("environment", {})
            empty = plain.get(name, {}).get("environment", {})
            filled = {key for key in values if key in empty and empty[key] is None}
            assert filled <= taken_out.get(name, {}).get("environment", {}).keys(), (override, name)


def test_every_container_has_a_read_only_root_and_no_rights() -> None:
    found = dict(services())
    for file in sorted((REPOSITORY / "compose").glob("*.yml")):
        found = {**services(f"compose/{file.name}"), **found}
    assert len(found) >= 10
    for name, service in found.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_each_image_is_built_for_one_service() -> None:
    """Services that built the same image left it to the last, and the others' without a name."""
    stages = services()
    builders = {name for name, service in stages.items() if "build" in service}
    assert builders == {"preflight"}
    assert len({service["image"] for service in stages.values()}) == 1
    # Nobody else's image of that name is taken.
    assert {service["pull_policy"] for service in stages.values()} == {"${PULL_POLICY:-never}"}
    for name, own in (("cpu", "hub"), ("replicas", "router"), ("monitoring", ""), ("speciale", "")):
        overridden = services(f"compose/{name}.yml")
        built = {key for key, service in overridden.items() if "build" in service}
        assert built <= {"preflight", own}
        # An override of the image is one for all: the status service had the other one.
        images = {overridden.get(stage, {}).get("image") for stage in stages}
        assert len(images) == 1


def test_a_card_is_named_and_no_more_is_asked_of_it_than_computing() -> None:
    for name in ("preflight", "serve"):
        (device,) = services()[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == ["${GPU_IDS:-0}"]
        # Without them the toolkit's default holds, which differs between its versions.
        assert device["capabilities"] == ["gpu", "compute", "utility"]


def test_what_shall_outlive_a_reboot_is_started_again() -> None:
    stages = services() | {"hub": services("compose/cpu.yml")["hub"]}
    for name in ("download", "convert", "serve", "status", "hub"):
        assert stages[name]["restart"] != "no", name
