"""The commands of the stages ``serve`` and ``convert``, built from the settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.launch.by_card import (
    attention_backend,
    choose_sizes,
    dense_attention,
    gpus_used,
    grows_segments,
)
from deploy.settings.config import Config
from deploy.settings.row import AUTO, Flag, Setting
from deploy.settings.table import TABLE
from deploy.settings.variables import BY_NAME, SECRETS, commanded, is_for, may_show
from kt_kernel.errors import MASK, UserError, without_passwords
from kt_kernel.host.cpus import cpus_beside_experts
from kt_kernel.host.machine import Machine
from kt_kernel.sglang_plugin.device import launch_environment

SGLANG_MODULE = "sglang.launch_server"
#: First word of the printed commands. What is started is the interpreter that runs this program.
PYTHON = "python"
#: What tells PyTorch's allocator how to take memory. torch 2.11 and 2.14 read both; some other
#: programs, such as torch_memory_saver, look at the first only.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: Values that are no secret, whatever the variable's name.
SWITCHES = ("0", "1", "true", "false")


@dataclass(frozen=True)
class Command:
    """A command to start.

    Attributes:
        argv: begins with :data:`PYTHON`.
        environment: variables to set besides the process's own; secrets are here, not in ``argv``,
            which all users of the host may read.
        notes: what ``auto`` settings were resolved to and why, one sentence each.
        extra: so many words at the end of ``argv`` are flags that no setting knows: of them the
            names only are printed.
        files: what has to be in files before it starts.
    """

    argv: list[str]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    files: Mapping[Path, bytes] = field(default_factory=dict)
    extra: int = 0

    def shown_argv(self) -> list[str]:
        """``argv`` with secrets masked."""
        known = len(self.argv) - self.extra
        words = [*self.argv[:known], *map(_flag_only, self.argv[known:])]
        return [without_passwords(word) for word in words]

    def shown(self) -> str:
        """The command as a shell would take it, secrets masked."""
        words = [
            f"{name}={value if may_show(name) or value in SWITCHES else MASK}"
            for name, value in sorted(self.environment.items())
        ]
        shown = shlex.join([*(["env", *words] if words else []), *self.shown_argv()])
        return without_passwords(shown)


def _flag_only(word: str) -> str:
    """A word of a command without what may be a value."""
    name, equals, _ = word.partition("=")
    return name + (f"={MASK}" if equals else "") if name.startswith("--") else MASK


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
    # model of this size on the CPU silently.
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
        why += f", {beside} CPUs left for SGLang's schedulers and for starting CUDA graphs' calls"
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
    allocator = _allocator_variables(config, values, machine)
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
    files: dict[Path, bytes] = {}
    if values["KT_EXPERT_PLACEMENT"] == "measured":
        from deploy.launch.placement import place  # it loads numpy

        placement = place(values)
        values["KT_EXPERT_PLACEMENT"] = placement.path
        notes = (*notes, placement.note)
        if placement.path is not None:
            files[placement.path] = placement.content
    else:
        values["KT_EXPERT_PLACEMENT"] = None  # as SGLang has them
    flags = _flags("serve", values)
    extra = config["KT_EXTRA_ARGS"] or []
    _refuse_repeated(extra, flags)
    words = [word for _, _, given in flags for word in given]
    return Command(
        [PYTHON, "-m", SGLANG_MODULE, *words, *extra],
        {
            **_serving_variables(config),
            **_keys(config),
            **_default_variables(config),
            **allocator,
            **launch_environment(device, config.environment),
        },
        notes,
        files,
        len(extra),
    )


def _keys(config: Config) -> dict[str, str]:
    """The keys of the server's routes, for the plugin (``kt_kernel.sglang_plugin.edge.access``)."""
    names = ("KT_API_KEY", "KT_ADMIN_KEY")
    return {name: config.text(name) for name in names if config[name] is not None}


def _default_variables(config: Config) -> dict[str, str]:
    """What other programs are told unless the user has decided otherwise.

    The Hub's client is not to look for a token in a file: that is the download's.
    """
    variables = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return {name: value for name, value in variables.items() if name not in config.environment}


def _allocator_variables(
    config: Config, values: Mapping[str, Any], machine: Machine
) -> dict[str, str]:
    """PyTorch's allocator on the GPU, unless the user has told it something himself."""
    if any(config.environment.get(name) for name in ALLOCATOR_VARIABLES):
        return {}
    grows = grows_segments(values, machine)
    return {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"} if grows else {}


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
    """SGLang takes the last of two equal flags and any unique beginning of one: refuse both.

    A secret would be shown, and code of the model's own run, without this program knowing of it:
    such flags are refused also where their setting gives none.
    """
    always = [
        (setting, flag)
        for setting, flag in commanded("serve")
        if setting.name == "KT_TRUST_REMOTE_CODE"
    ]
    always += [(setting, Flag("serve", name)) for setting in TABLE for name in setting.instead_of]
    taken = [(setting, flag) for setting, flag, _ in flags] + always
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
