"""Checks of the model directory and of the packed weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from convert.source.config import CONFIG_NAME
from deploy.checks.result import Finding, Status, warn_unless
from deploy.checks.situation import Situation, check
from deploy.hub.marker import file_size, read_marker
from kt_kernel.errors import UserError
from kt_kernel.files.foreign import FileMissing, read_fields

# What reads packed weights and checkpoints loads numpy, which `serve --print` does without: below.
if TYPE_CHECKING:
    from convert.manifest_file import Description

DOWNLOAD = "run `python entrypoint.py download`"
CONVERT = "run `python entrypoint.py convert`"


@check("model", host=False)
def check_model(situation: Situation) -> Iterator[Finding]:
    """The checkpoint is there in full, as far as that shows without reading its data."""
    from convert.source.checkpoint import Checkpoint

    path = situation.model_path
    expected = f"a complete checkpoint in KT_MODEL_PATH {path}"

    def fail(found: str, todo: str = DOWNLOAD) -> Finding:
        return Finding(Status.FAIL, expected, found, todo)

    if not path.is_dir():
        yield fail("no such directory", f"{DOWNLOAD} or set KT_MODEL_PATH")
        return
    try:
        marker = read_marker(path)
        if marker is not None and not marker.complete:
            yield fail("an unfinished download", f"{DOWNLOAD} to finish it")
            return
        if not (path / CONFIG_NAME).is_file():
            yield fail(f"no {CONFIG_NAME}", f"{DOWNLOAD} or set KT_MODEL_PATH")
            return
        missing = marker.missing(path) if marker is not None else []
        if missing:
            yield fail(f"{_shortened(missing)} missing or of another size than downloaded")
            return
        with Checkpoint(path) as checkpoint:
            shards = len(checkpoint.shards)
    except UserError as error:
        yield fail(str(error), "repair that or download again")
        return
    origin = f", {marker.repo_id} at commit {marker.revision[:12]}" if marker else ""
    yield Finding(Status.PASS, expected, f"{shards} shards{origin}")


@check("model-settings", host=False)
def check_model_settings(situation: Situation) -> Iterator[Finding]:
    """Settings that count the model's experts, or replace what its config says, fit the config."""
    try:
        config = read_fields(situation.model_path / CONFIG_NAME).values
    except UserError:
        return  # the model's own check reports that
    values = situation.values
    wrong = []
    for name, keys in _COUNTS.items():
        most = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
        if most is not None and (found := values[name]) is not None and found > most:
            wrong.append((f"{name} of at most {most}", str(found), f"set {name}={most} or less"))
    overrides = values["KT_MODEL_OVERRIDE_ARGS"] or {}
    for key in sorted(overrides.keys() & config.keys()):
        old, new = config[key], overrides[key]
        if not (old is None or new is None or _kind(old) == _kind(new)):
            name = "KT_MODEL_OVERRIDE_ARGS"
            wanted = f"{key} in {name} to be {_kind(old)}, as in {CONFIG_NAME}"
            wrong.append((wanted, _kind(new), f"correct it in {name}"))
    for expected, found, todo in wrong:
        yield Finding(Status.FAIL, expected, found, todo)
    if not wrong:
        yield Finding(Status.PASS, f"settings that fit the model's {CONFIG_NAME}", "such settings")


#: What a setting counts, by the names that configs have for how many there are.
_COUNTS = {
    "KT_NUM_GPU_EXPERTS": ("n_routed_experts", "num_experts", "num_local_experts"),
    "KT_MAX_DEFERRED_EXPERTS_PER_TOKEN": ("num_experts_per_tok",),
}


def _kind(value: object) -> str:
    """What a value of JSON is, in words; the value itself may be private."""
    kinds = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


@check("remote-code", host=False)
def check_remote_code(situation: Situation) -> Iterator[Finding]:
    """No Python code of the model's own will run that nobody has read."""
    expected = "no Python code that comes with the model to run in the server"
    if not situation.values["KT_TRUST_REMOTE_CODE"]:
        yield Finding(Status.PASS, expected, "KT_TRUST_REMOTE_CODE off")
        return
    code = _code_of(situation.model_path)
    yield warn_unless(
        not code,
        expected,
        "KT_TRUST_REMOTE_CODE on, " + (_shortened(code) or "and no such code"),
        "it has all rights of the server: read it and pin KT_MODEL_REVISION, or set "
        "KT_TRUST_REMOTE_CODE=0, V3.2 needs none",
    )


def _code_of(model_path: Path) -> list[str]:
    """What of a model's directory SGLang's libraries would run, or fetch from the Hub and run."""
    names = sorted(path.name for path in model_path.glob("*.py"))
    for path in sorted(model_path.glob("*config.json")):
        try:
            if read_fields(path).has("auto_map"):
                names.append(f"auto_map in {path.name}")
        except UserError:
            continue  # damage is the model's check to tell
    return names


@check("weights", host=False)
def check_weights(situation: Situation) -> Iterator[Finding]:
    """The packed weights are there in full, of the right method and of this very model."""
    from convert import manifest_file
    from kt_kernel.packed import KT_METHODS, MANIFEST_NAME, METHODS

    path, method = situation.weight_path, situation.values["KT_METHOD"]
    expected = f"finished {method} weights in KT_WEIGHT_PATH {path}"

    def fail(found: str, todo: str = CONVERT) -> Finding:
        return Finding(Status.FAIL, expected, found, todo)

    if not path.is_dir():
        yield fail("no such directory", f"{CONVERT} or set KT_WEIGHT_PATH")
        return
    try:
        # Loading does not depend on it, and each layer file is checked by its own header.
        found = manifest_file.read_manifest(path / MANIFEST_NAME, check_digest=False)
        manifest = manifest_file.read_description(found)
        layers = manifest_file.read_layers(found)
        complete = found.flag("complete")
        damaged = [
            record.file
            for record in layers.values()
            if file_size(path / record.file) != record.bytes
        ]
        difference = _difference(manifest, situation.model_path)
    except FileMissing:
        yield fail(f"no {MANIFEST_NAME}", f"{CONVERT} or set KT_WEIGHT_PATH")
        return
    except manifest_file.OtherVersion as error:
        yield fail(error.reason, "delete them and convert again")
        return
    except manifest_file.Damaged as error:
        yield fail(error.reason, f"{CONVERT}, which makes it again")
        return
    except UserError as error:
        yield fail(str(error), "repair that first")
        return
    held = manifest.layout.method
    other = METHODS[held].kt_method
    if other != method:
        yield fail(
            f"{held} weights",
            f"set KT_METHOD={other} or convert with KT_QUANT_METHOD={KT_METHODS[method]} to "
            f"another KT_WEIGHT_PATH",
        )
        return
    if not complete or set(layers) != set(manifest.moe_layers):
        yield fail(
            f"{len(layers)} of {len(manifest.moe_layers)} layers", f"{CONVERT} to finish them"
        )
        return
    if damaged:
        yield fail(f"{_shortened(damaged)} missing or of another size", f"{CONVERT} to repair them")
    elif difference is not None:
        yield fail(
            f"weights of another model, {difference}",
            "set KT_WEIGHT_PATH to this model's weights or convert it to another directory",
        )
    else:
        yield Finding(Status.PASS, expected, f"{len(layers)} layers of this model")


def _difference(manifest: Description, model_path: Path) -> str | None:
    """How the weights differ from the model; None if they do not, or if there is no model."""
    from convert.source.checkpoint import Checkpoint

    if not (model_path / CONFIG_NAME).is_file():
        return None  # the model's own check reports that
    marker = read_marker(model_path)
    theirs = manifest.origin.get("repo_id")
    if marker is not None and theirs is not None and theirs != marker.repo_id:
        return f"{theirs} instead of {marker.repo_id}"
    try:
        with Checkpoint(model_path) as checkpoint:
            dims, fingerprint = checkpoint.dims, checkpoint.fingerprint()
    except UserError:
        return None  # the model's own check reports that
    layout = manifest.layout
    for name, found, wanted in (
        ("hidden_size", layout.hidden_size, dims.hidden_size),
        ("intermediate_size", layout.intermediate_size, dims.intermediate_size),
        ("num_experts", layout.num_experts, dims.num_experts),
        ("moe_layers", list(manifest.moe_layers), dims.moe_layers()),
    ):
        if found != wanted:
            return f"{name} {json.dumps(found)} instead of {json.dumps(wanted)}"
    if manifest.fingerprint != fingerprint:
        return f"same sizes but other tensors or another {CONFIG_NAME}"
    return None


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more files"
