"""The commands of the stages ``serve`` and ``convert``, built from the settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.by_card import attention_backend, choose_sizes, dense_attention, gpus_used
from deploy.config import Config
from deploy.machine import Machine
from deploy.setting import AUTO, Flag, Setting
from deploy.settings import BY_NAME, SECRETS, commanded, is_for
from kt_kernel.errors import UserError
from kt_kernel.host import cpus_beside_experts
from kt_kernel.sglang_plugin.device import launch_environment

SGLANG_MODULE = "sglang.launch_server"
#: First word of the printed commands. What is started is the interpreter that runs this program.
PYTHON = "python"
#: What a secret looks like in printed commands.
MASK = "***"


@dataclass(frozen=True)
class Command:
    """A command to start.

    Attributes:
        argv: begins with :data:`PYTHON`.
        environment: variables to set besides the process's own.
        notes: what ``auto`` settings were resolved to and why, one sentence each.
        secrets: words of ``argv`` that must not be printed.
    """

    argv: list[str]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    secrets: frozenset[str] = frozenset()

    def shown_argv(self) -> list[str]:
        """``argv`` with its secrets masked."""
        return [MASK if word in self.secrets else word for word in self.argv]

    def shown(self) -> str:
        """The command as a shell would take it, secrets masked."""
        words = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        return shlex.join([*(["env", *words] if words else []), *self.shown_argv()])


def resolve(
    config: Config, machine: Machine, stage: str = "serve"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings' values with every ``auto`` replaced, and notes on what was chosen and why."""
    values = dict(config.values)
    notes: list[str] = []

    def choose(name: str, value: Any, why: str) -> None:
        if values[name] == AUTO:
            values[name] = value
            notes.append(f"{name}=auto is {_word(value)}: {why}")

    gpu = machine.gpu
    # A GPU that does not work is not taken for none: the checks refuse it, instead of serving a
    # model of this size on the CPU without a word.
    choose(
        "KT_DEVICE",
        "cuda" if gpu or machine.gpu_problem else "cpu",
        f"found {gpu.name}" if gpu else machine.gpu_problem or "no NVIDIA GPU found",
    )
    # The conversion leaves the GPU alone.
    gpus = gpus_used(values) if stage == "serve" else 0
    why = f"{machine.cores} physical cores"
    if machine.cpu_quota:
        why += f", a quota of {machine.cpu_quota:g} CPUs"
    if gpus:
        beside = cpus_beside_experts(gpus)
        why += f", {beside} CPUs left for SGLang's schedulers and CUDA's host functions"
    choose("KT_CPUINFER", machine.expert_threads(gpus), why)
    choose(
        "KT_THREADPOOL_COUNT",
        min(machine.numa_nodes, values["KT_CPUINFER"]),
        f"{machine.numa_nodes} NUMA nodes",
    )
    speciale = is_speciale(config)
    if speciale:
        choose("KT_TOOL_CALL_PARSER", None, "the Speciale model knows no tools")
        choose("KT_DEFAULT_THINKING", True, "the Speciale model was trained for thinking only")
    else:
        values["KT_TOOL_CALL_PARSER"] = _unless_auto(values, "KT_TOOL_CALL_PARSER", "deepseekv32")
        values["KT_DEFAULT_THINKING"] = _unless_auto(values, "KT_DEFAULT_THINKING", False)
    dense, why = dense_attention(values, machine)
    choose("KT_DENSE_ATTENTION", "on" if dense else "off", why)
    choose("KT_ATTENTION_BACKEND", *attention_backend(values))
    sizes = choose_sizes(values, machine)
    for name, value in sizes.values.items():
        choose(name, value, sizes.why)
    return values, tuple(notes)


def is_speciale(config: Config) -> bool:
    """Whether the settings name the model DeepSeek-V3.2-Speciale."""
    names = ("KT_MODEL_ID", "KT_MODEL_PATH", "KT_SERVED_MODEL_NAME")
    return any("speciale" in str(config[name]).lower() for name in names)


def _unless_auto(values: Mapping[str, Any], name: str, value: Any) -> Any:
    return value if values[name] == AUTO else values[name]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def serve_command(config: Config, machine: Machine) -> Command:
    """The command that starts SGLang: the tutorial's flags in its order, then ours.

    Raises:
        UserError: KT_EXTRA_ARGS gives a flag that a setting already gives.
    """
    values, notes = resolve(config, machine)
    device = values["KT_DEVICE"]
    override = dict(values["KT_MODEL_OVERRIDE_ARGS"] or {})
    if values["KT_DENSE_ATTENTION"] == "on":
        override = {"index_topk": None, **override}
    values["KT_MODEL_OVERRIDE_ARGS"] = json.dumps(override) if override else None
    thinking = values["KT_DEFAULT_THINKING"]
    values["KT_DEFAULT_THINKING"] = json.dumps({"thinking": True}) if thinking else None
    if device == "cpu":
        values["KT_PREFILL_CUDA_GRAPH"] = values["KT_DECODE_CUDA_GRAPH"] = None
    else:
        values["KT_DEVICE"] = None
    flags = _flags("serve", values)
    extra = config["KT_EXTRA_ARGS"] or []
    _refuse_repeated(extra, flags)
    words = [word for _, _, given in flags for word in given]
    secrets = [str(values[s.name]) for s, _, given in flags if s.secret and given]
    return Command(
        [PYTHON, "-m", SGLANG_MODULE, *words, *extra],
        {
            **_serving_variables(config),
            **_health_variable(config),
            **launch_environment(device, config.environment),
        },
        notes,
        frozenset(secrets),
    )


def _health_variable(config: Config) -> dict[str, str]:
    """Keep SGLang's /health from generating a token, unless the user has decided otherwise.

    It answers 503 when the token takes 20 s, and a chunk of a prompt can take 40 s on the CPU: a
    busy server would be restarted. ``/health_generate`` generates all the same.
    """
    name = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
    return {} if name in config.environment else {name: "false"}


def convert_command(config: Config, machine: Machine) -> Command:
    """The command that converts the experts' weights, with the tutorial's flags."""
    values, notes = resolve(config, machine, "convert")
    words = [word for _, _, given in _flags("convert", values) for word in given]
    notes = tuple(note for note in notes if "convert" in BY_NAME[note.split("=")[0]].stages)
    return Command([PYTHON, "-m", "convert", *words], {}, notes)


def _flags(stage: str, values: Mapping[str, Any]) -> list[tuple[Setting, Flag, list[str]]]:
    """The rows of a stage's command that are given, with their words."""
    rows = []
    for setting, flag in commanded(stage):
        value = values[setting.name]
        if value is None:
            continue
        if isinstance(value, bool):
            given = [flag.name] if value != flag.inverted else []
        else:
            given = [flag.name, _as_word(value)]
        if given:
            rows.append((setting, flag, given))
    return rows


def _as_word(value: Any) -> str:
    """A value as people write it: 1800, not 1800.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _refuse_repeated(
    extra: Sequence[str], flags: Sequence[tuple[Setting, Flag, list[str]]]
) -> None:
    """SGLang takes the last of two equal flags and any unique beginning of one: refuse both."""
    secret = [(setting, flag) for setting, flag in commanded("serve") if setting.secret]
    taken = [(setting, flag) for setting, flag, _ in flags] + secret
    for word in extra:
        if not word.startswith("--") or word == "--":
            continue
        name = word.partition("=")[0]
        for setting, flag in taken:
            spellings = (flag.name, *flag.aliases)
            if name in spellings:
                raise UserError(
                    f"KT_EXTRA_ARGS gives {name}, which is {setting.name}'s: "
                    f"set {setting.name} instead"
                )
            if any(spelling.startswith(name) for spelling in spellings):
                raise UserError(
                    f"KT_EXTRA_ARGS gives {name}, which may be short for {flag.name} of "
                    f"{setting.name}: write the flag in full or set {setting.name}"
                )


def _serving_variables(config: Config) -> dict[str, str]:
    """Variables of the env files that SGLang and the kernel read in their own right."""
    return {
        name: config.environment[name]
        for name in config.from_files
        if is_for(name, "serve")
        and name not in SECRETS
        and (name not in BY_NAME or BY_NAME[name].by_name)
    }
