"""What ``serve`` and ``check`` find wrong."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.checks import gpu as checks_gpu
from deploy.checks import model as checks_model
from deploy.checks.exposure import check_exposure, check_rendezvous
from deploy.checks.port import check_port
from deploy.checks.result import Result, Status
from deploy.checks.situation import Check, Situation
from deploy.checks.threads import check_thread_pools, check_threads
from deploy.hub.marker import Marker, RepoFile
from deploy.launch.argv import resolve
from deploy.settings.config import load
from kt_kernel.host.addresses import free_port
from kt_kernel.host.machine import Machine
from tests.deploy.helpers import L20, LAPTOP, REPO_ID, Prepared, fails, run, with_gpu


def results(check: Check, machine: Machine = LAPTOP, /, **settings: str) -> list[Result]:
    """Run one check with these settings."""
    config = load(settings)
    values, _ = resolve(config, machine)
    return list(check(Situation(values, config.environment, machine)))


def sentence(check: Check, machine: Machine = LAPTOP, /, **settings: str) -> str:
    """Run one check that must fail once; what it says."""
    failed = [r for r in results(check, machine, **settings) if r.status is Status.FAIL]
    assert len(failed) == 1
    assert failed[0].todo
    assert "\n" not in failed[0].sentence()
    return failed[0].sentence()


def paths(model: Path, weights: Path, **more: str) -> dict[str, str]:
    return {"KT_MODEL_PATH": str(model), "KT_WEIGHT_PATH": str(weights), **more}


@pytest.fixture
def model(prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the model that may be broken."""
    return Path(shutil.copytree(prepared.model, tmp_path / "model"))


@pytest.fixture
def weights(prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the INT4 weights that may be broken."""
    return Path(shutil.copytree(prepared.int4, tmp_path / "int4"))


def test_sound_model_and_weights(prepared: Prepared) -> None:
    for check in (checks_model.check_model, checks_model.check_weights):
        found = results(check, **paths(prepared.model, prepared.int4))
        assert [r.status for r in found] == [Status.PASS]
    found = results(
        checks_model.check_weights, **paths(prepared.model, prepared.int8, KT_METHOD="AMXINT8")
    )
    assert [r.status for r in found] == [Status.PASS]


def test_code_that_the_model_brings(tmp_path: Path) -> None:
    """By a file of its own, or by a name that is fetched from the Hub."""

    def found(**settings: str) -> Result:
        (only,) = results(checks_model.check_remote_code, KT_MODEL_PATH=str(tmp_path), **settings)
        return only

    assert found(KT_TRUST_REMOTE_CODE="1").status is Status.PASS
    (tmp_path / "modeling_x.py").touch()
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "a/b--c.D"}}')
    assert found().status is Status.PASS  # off
    on = found(KT_TRUST_REMOTE_CODE="1")
    assert on.status is Status.WARN
    assert "modeling_x.py, auto_map in tokenizer_config.json" in on.sentence()
    assert "all rights of the server" in on.sentence()


def test_no_model(tmp_path: Path) -> None:
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(tmp_path / "no"))
    assert f"KT_MODEL_PATH {tmp_path}/no, found no such directory" in text
    assert "entrypoint.py download" in text


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(model))
    assert "found no config.json" in text


def test_a_config_that_is_no_json(model: Path) -> None:
    (model / "config.json").write_text("{")
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(model))
    assert f"{model}/config.json is not valid JSON" in text


def test_a_missing_shard(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(model))
    assert f"{shard} does not exist" in text


def test_a_truncated_shard(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(model))
    assert str(shard) in text


def marker_of(model: Path, repo_id: str = REPO_ID) -> Marker:
    files = {
        path.name: RepoFile(path.stat().st_size, "", "0" * 40)
        for path in model.iterdir()
        if not path.name.startswith(".")
    }
    return Marker(repo_id, "main", "1" * 40, files, complete=True)


def test_an_unfinished_download(model: Path) -> None:
    marker = marker_of(model)
    marker.save(model)
    assert results(checks_model.check_model, KT_MODEL_PATH=str(model))[0].status is Status.PASS
    marker.complete = False
    marker.save(model)
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(model))
    assert "found an unfinished download" in text


def test_a_file_changed_after_the_download(model: Path) -> None:
    marker_of(model).save(model)
    with (model / "tokenizer.json").open("a") as file:
        file.write(" ")
    text = sentence(checks_model.check_model, KT_MODEL_PATH=str(model))
    assert "tokenizer.json missing or of another size than downloaded" in text


def test_no_weights(prepared: Prepared, tmp_path: Path) -> None:
    text = sentence(checks_model.check_weights, **paths(prepared.model, tmp_path / "no"))
    assert f"KT_WEIGHT_PATH {tmp_path}/no, found no such directory" in text
    assert "entrypoint.py convert" in text
    text = sentence(checks_model.check_weights, **paths(prepared.model, tmp_path))
    assert "found no manifest.json" in text


def test_unfinished_weights(prepared: Prepared, weights: Path) -> None:
    manifest = json.loads((weights / "manifest.json").read_text())
    layers = len(manifest["layers"])
    manifest["complete"] = False
    manifest["layers"].popitem()
    (weights / "manifest.json").write_text(json.dumps(manifest))
    text = sentence(checks_model.check_weights, **paths(prepared.model, weights))
    assert f"found {layers - 1} of {layers} layers" in text


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"method": "int4", "complete": true}'])
def test_a_manifest_that_is_none(prepared: Prepared, weights: Path, text: str) -> None:
    (weights / "manifest.json").write_text(text)
    assert "manifest.json" in sentence(checks_model.check_weights, **paths(prepared.model, weights))


def test_int8_weights_opened_as_int4(prepared: Prepared) -> None:
    text = sentence(checks_model.check_weights, **paths(prepared.model, prepared.int8))
    assert "expected finished AMXINT4 weights" in text
    assert "found int8 weights" in text
    assert "set KT_METHOD=AMXINT8" in text


def test_weights_of_another_format_version(prepared: Prepared, weights: Path) -> None:
    manifest = json.loads((weights / "manifest.json").read_text())
    (weights / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    text = sentence(checks_model.check_weights, **paths(prepared.model, weights))
    assert "found weights in version 99 of the format" in text


def test_a_damaged_layer(prepared: Prepared, weights: Path) -> None:
    layers = sorted(weights.glob("layer-*.safetensors"))
    layers[0].write_bytes(layers[0].read_bytes()[:-1])
    layers[1].unlink()
    text = sentence(checks_model.check_weights, **paths(prepared.model, weights))
    assert f"{layers[0].name}, {layers[1].name} missing or of another size" in text


def change_config(model: Path, **fields: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **fields}))


def test_weights_of_a_model_of_other_sizes(model: Path, weights: Path) -> None:
    change_config(model, n_routed_experts=8)
    text = sentence(checks_model.check_weights, **paths(model, weights))
    assert "weights of another model, num_experts 16 instead of 8" in text


def test_weights_of_a_model_of_the_same_sizes(model: Path, weights: Path) -> None:
    change_config(model, rope_theta=1)
    text = sentence(checks_model.check_weights, **paths(model, weights))
    assert "same sizes but other tensors or another config.json" in text


def test_weights_of_another_repository(model: Path, weights: Path) -> None:
    """V3.2 and Speciale have the same sizes, names and config."""
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["source"]["repo_id"] = "deepseek-ai/DeepSeek-V3.2-Speciale"
    (weights / "manifest.json").write_text(json.dumps(manifest))
    marker_of(model, "deepseek-ai/DeepSeek-V3.2").save(model)
    text = sentence(checks_model.check_weights, **paths(model, weights))
    assert "deepseek-ai/DeepSeek-V3.2-Speciale instead of deepseek-ai/DeepSeek-V3.2" in text


@pytest.mark.parametrize(
    ("machine", "threads", "status"),
    [
        (LAPTOP, "4", Status.PASS),
        (LAPTOP, "5", Status.WARN),
        (LAPTOP, "8", Status.WARN),
        (LAPTOP, "9", Status.FAIL),
        (Machine(8, 4, 1, 3.5, None), "3", Status.PASS),
        (Machine(8, 4, 1, 3.5, None), "4", Status.FAIL),
        (with_gpu(L20), "auto", Status.PASS),
        (replace(with_gpu(L20), cpus=64, cores=64), "62", Status.PASS),
        (replace(with_gpu(L20), cpus=64, cores=64), "63", Status.WARN),
    ],
)
def test_threads(machine: Machine, threads: str, status: Status) -> None:
    found = results(check_threads, machine, KT_CPUINFER=threads)
    assert found[0].status is status
    if status is Status.FAIL:
        assert f"set KT_CPUINFER={machine.expert_threads(0)}" in found[0].todo


def test_each_gpus_scheduler_has_a_cpu_of_its_own() -> None:
    machine = replace(with_gpu(replace(L20, count=2)), cpus=64, cores=64)
    both = {"KT_TENSOR_PARALLEL_SIZE": "2"}
    assert resolve(load(both), machine)[0]["KT_CPUINFER"] == 61
    for threads, status in (("61", Status.PASS), ("62", Status.WARN)):
        found = results(check_threads, machine, KT_CPUINFER=threads, **both)
        assert found[0].status is status


def test_thread_pools() -> None:
    text = sentence(check_thread_pools, KT_CPUINFER="2", KT_THREADPOOL_COUNT="3")
    assert "KT_THREADPOOL_COUNT of at most KT_CPUINFER=2" in text
    found = results(check_thread_pools, KT_CPUINFER="2", KT_THREADPOOL_COUNT="2")
    assert found[0].status is Status.WARN
    found = results(check_thread_pools, with_gpu(L20), KT_THREADPOOL_COUNT="2")
    assert found[0].status is Status.PASS
    # What auto gives one thread, which cannot be in two pools.
    found = results(check_thread_pools, with_gpu(L20), KT_CPUINFER="1")
    assert (found[0].status, found[0].found) == (Status.PASS, "1")


def test_device() -> None:
    text = sentence(checks_gpu.check_device, KT_DEVICE="cuda")
    assert "expected an NVIDIA GPU, found no GPU: set KT_DEVICE=cpu" in text
    assert results(checks_gpu.check_device)[0].status is Status.PASS
    assert results(checks_gpu.check_device, with_gpu(L20))[0].found.startswith("NVIDIA L20, 48 GiB")
    broken = Machine(8, 4, 1, None, None, "libcuda.so.1 is missing")
    assert "libcuda.so.1 is missing" in sentence(checks_gpu.check_device, broken, KT_DEVICE="cuda")
    assert "libcuda.so.1 is missing" in sentence(checks_gpu.check_device, broken)  # auto
    assert results(checks_gpu.check_device, broken, KT_DEVICE="cpu")[0].status is Status.WARN


@pytest.fixture
def taken_port() -> Iterator[str]:
    """A port on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


def test_port(taken_port: str) -> None:
    text = sentence(check_port, KT_HOST="127.0.0.1", KT_PORT=taken_port)
    assert f"expected port {taken_port} on 127.0.0.1 to be free" in text
    assert "found another program listening there" in text
    # Every address, as in the tutorial, includes that one.
    assert "another program" in sentence(check_port, KT_HOST="0.0.0.0", KT_PORT=taken_port)
    unknown = sentence(check_port, KT_HOST="no-such-host.invalid")
    assert "is no address" in unknown
    assert "set KT_HOST to 127.0.0.1, or" in unknown  # 0.0.0.0 wants a key
    assert "address of this machine" in sentence(check_port, KT_HOST="192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = str(server.getsockname()[1])
    assert results(check_port, KT_PORT=free)[0].status is Status.PASS


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, None),
        ({"KT_HOST": "::1"}, None),
        ({"KT_HOST": "localhost"}, None),
        ({"KT_HOST": "0.0.0.0"}, "no key and KT_HOST 0.0.0.0"),
        ({"KT_HOST": "192.168.0.5"}, "no key and KT_HOST 192.168.0.5"),
        ({"KT_HOST": "::"}, "no key and KT_HOST ::"),
        ({"KT_HOST": "0.0.0.0", "KT_API_KEY": "k"}, None),
        # The other key does not close what computes answers.
        ({"KT_HOST": "0.0.0.0", "KT_ADMIN_KEY": "k"}, "no key and KT_HOST 0.0.0.0"),
        # In a container.
        ({"KT_HOST": "0.0.0.0", "KT_PUBLISHED_HOST": "127.0.0.1"}, None),
        ({"KT_HOST": "127.0.0.1", "KT_PUBLISHED_HOST": "10.0.0.1"}, "KT_PUBLISHED_HOST 10.0.0.1"),
        ({"KT_API_KEY": "same-key", "KT_ADMIN_KEY": "same-key"}, "the same"),
    ],
)
def test_others_reach_the_server_with_a_key_only(
    settings: dict[str, str], found: str | None
) -> None:
    bad = [one for one in results(check_exposure, **settings) if one.status is Status.FAIL]
    assert len(bad) == (found is not None)
    assert all(found in one.sentence() and one.todo for one in bad if found)
    assert "same-key" not in str(bad)


def test_pytorchs_store_is_for_this_host() -> None:
    for host, where in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "::1")):
        (good,) = results(check_rendezvous, KT_HOST=host)
        assert good.status is Status.PASS
        assert f"found it on {where}, on a port" in good.sentence()
    (other,) = results(check_rendezvous, KT_HOST="192.168.0.5")
    assert other.status is Status.WARN
    assert "found it on 192.168.0.5, on a port" in other.sentence()


CPU = {"KT_DEVICE": "cpu", "KT_CPUINFER": "1", "KT_THREADPOOL_COUNT": "1", "KT_HOST": "127.0.0.1"}


def test_serve_ends_with_one_line(prepared: Prepared, tmp_path: Path, taken_port: str) -> None:
    here = paths(prepared.model, prepared.int4)
    line = fails("serve", **here, **CPU, KT_PORT=taken_port)
    assert line.startswith(f"error: port: expected port {taken_port} on 127.0.0.1 to be free")
    here["KT_PORT"] = str(free_port())
    line = fails("serve", **{**here, "KT_MODEL_PATH": str(tmp_path / "no")}, **CPU)
    assert line.startswith(
        f"error: model: expected a complete checkpoint in KT_MODEL_PATH "
        f"{tmp_path}/no, found no such directory"
    )
    line = fails("serve", **{**here, "KT_WEIGHT_PATH": str(prepared.int8)}, **CPU)
    assert line.startswith("error: weights: expected finished AMXINT4 weights")


def test_serve_tells_everything_at_once(tmp_path: Path, taken_port: str) -> None:
    here = {**paths(tmp_path / "a", tmp_path / "b"), **CPU, "KT_PORT": taken_port}
    result = run("serve", **here)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split()[1] for line in errors] == ["model:", "weights:", "port:"]
    ignored = run("serve", **here, KT_IGNORE_CHECKS="weights, port")
    assert ignored.returncode == 2
    # Other warnings depend on the machine: its instruction set, say.
    told = [line.split()[:2] for line in ignored.stderr.splitlines()]
    assert [words for words in told if words[1:] in (["weights:"], ["port:"], ["model:"])] == [
        ["warning:", "weights:"],
        ["warning:", "port:"],
        ["error:", "model:"],
    ]


def test_check_report(prepared: Prepared, taken_port: str) -> None:
    here = {**paths(prepared.model, prepared.int4), **CPU}
    good = run("check", **here, KT_PORT="39123")
    assert good.returncode == 0, good
    assert " 0 failed, " in good.stdout.splitlines()[-1]
    bad = run("check", **here, KT_PORT=taken_port)
    assert bad.returncode == 1
    assert f"FAIL: port: expected port {taken_port}" in bad.stdout
    assert bad.stderr == ""


def test_check_json(prepared: Prepared, tmp_path: Path) -> None:
    here = {**paths(prepared.model, tmp_path), **CPU}
    result = run("check", "--json", **here, KT_PORT="39123")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    by_name = {entry["check"]: entry for entry in report["checks"]}
    assert by_name["model"]["status"] == "PASS"
    assert by_name["weights"]["status"] == "FAIL"
    assert set(by_name["weights"]) == {"check", "status", "expected", "found", "todo"}


def test_convert_passes_the_exit_code_on(tmp_path: Path, model: Path) -> None:
    line = fails("convert", **paths(tmp_path / "no", tmp_path / "out"))
    assert line == (
        f"error: KT_MODEL_PATH {tmp_path}/no does not exist: run `python entrypoint.py download` "
        "first, or set it to a checkpoint's directory"
    )
    (tmp_path / "empty").mkdir()
    line = fails("convert", **paths(tmp_path / "empty", tmp_path / "out"))
    assert line.endswith("KT_MODEL_PATH must be the directory of a downloaded checkpoint")
    line = fails("convert", **paths(model, tmp_path / "out"), KT_CONVERT_LAYERS="90")
    assert "error: KT_CONVERT_LAYERS 90-90 holds no layer with experts" in line
    marker = marker_of(model)
    marker.complete = False
    marker.save(model)
    line = fails("convert", **paths(model, tmp_path / "out"))
    assert "unfinished download" in line
    assert not (tmp_path / "out").exists()
