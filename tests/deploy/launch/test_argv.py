"""The commands of ``serve`` and ``convert``."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.launch.argv import convert_command, serve_command
from deploy.settings.config import load
from deploy.settings.row import Setting
from deploy.settings.table import TABLE
from deploy.settings.variables import commanded
from kt_kernel.errors import UserError
from kt_kernel.host.machine import Machine
from tests.deploy.helpers import H200, L20, LAPTOP, REPOSITORY, run, with_gpu
from tests.deploy.tutorial_commands import CONVERT, LAUNCH, words

TUTORIAL = REPOSITORY / "env" / "tutorial.env"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
SPECIALE = REPOSITORY / "env" / "speciale.env"
ADDED = [
    "--json-model-override-args",
    '{"index_topk": null}',
    "--disable-prefill-cuda-graph",
    "--tool-call-parser",
    "deepseekv32",
    "--reasoning-parser",
    "deepseek-v3",
    "--watchdog-timeout",
    "1800",
    "--enable-metrics",
]


def serve(machine: Machine = LAPTOP, files: tuple[Path, ...] = (), /, **settings: str) -> list[str]:
    """The argv of serve."""
    return serve_command(load(settings, files), machine).argv


def value(argv: list[str], flag: str) -> str | None:
    """What follows a flag."""
    return argv[argv.index(flag) + 1] if flag in argv else None


@pytest.mark.parametrize(
    "machine", [LAPTOP, with_gpu(L20), with_gpu(H200)], ids=["laptop", "l20", "h200"]
)
def test_the_tutorial_flag_for_flag_on_any_machine(machine: Machine) -> None:
    assert serve(machine, (TUTORIAL,)) == words(LAUNCH) + ADDED


def test_print_json_is_exactly_that() -> None:
    result = run("--env-file", TUTORIAL, "serve", "--print", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {"argv": words(LAUNCH) + ADDED}


def test_print_is_a_shell_command() -> None:
    result = run("serve", "--print", "--env-file", TUTORIAL)
    assert (result.returncode, result.stderr) == (0, "")
    variables = [
        "HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
        "KT_DEVICE=cuda",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ]
    assert words(result.stdout) == ["env", *variables, *words(LAUNCH), *ADDED]
    assert result.stdout.count("\n") == 1


def test_print_says_beside_the_command_what_auto_is() -> None:
    """The documents say so of `serve`, and `--print` left it out."""
    result = run("serve", "--print", KT_DEVICE="cpu")
    assert "KT_CPUINFER=auto is " in result.stderr
    assert result.stdout.count("\n") == 1


def test_the_tutorials_conversion() -> None:
    argv = convert_command(load({}, [TUTORIAL]), LAPTOP).argv
    expected = words(CONVERT)
    assert argv == ["python", "-m", "convert", *expected[2:]]


def test_the_environment_wins_over_the_file() -> None:
    argv = serve(LAPTOP, (TUTORIAL,), KT_MODEL_PATH="/data/v32", KT_CPUINFER="48")
    assert value(argv, "--model") == "/data/v32"
    assert value(argv, "--kt-cpuinfer") == "48"


def test_every_added_flag_can_be_turned_off() -> None:
    """By the very assignment that docs/configuration.md gives."""
    settings = {}
    for setting in TABLE:
        if setting.turn_off:
            name, _, text = setting.turn_off.partition("=")
            assert name == setting.name
            settings[name] = text
    command = serve_command(load(settings, [TUTORIAL]), LAPTOP)
    assert command.argv == words(LAUNCH)
    assert ALLOCATOR not in command.environment


@pytest.mark.parametrize("setting", [s for s in TABLE if s.adds], ids=lambda s: s.name)
def test_added_flags_are_what_the_docs_say(setting: Setting) -> None:
    """Each documented flag or variable appears in at least one situation, as written."""
    speciale = {"KT_MODEL_ID": "deepseek-ai/DeepSeek-V3.2-Speciale"}
    commands = [
        words(serve_command(load(settings), machine).shown())
        for machine, settings in ((LAPTOP, {}), (with_gpu(L20), {}), (with_gpu(L20), speciale))
    ]
    documented = shlex.split(setting.adds)
    assert any(
        argv[i : i + len(documented)] == documented for argv in commands for i in range(len(argv))
    )


@pytest.mark.parametrize(
    ("machine", "settings"),
    [
        (with_gpu(L20), {}),
        (with_gpu(H200), {"PYTORCH_ALLOC_CONF": ""}),  # as compose hands on what nobody set
        (LAPTOP, {"KT_DEVICE": "cuda"}),
        (with_gpu(L20), {"KT_EXTRA_ARGS": "--enable-torch-compile --dtype float16 -x"}),
    ],
)
def test_one_gpu_gives_its_memory_in_segments_that_grow(
    machine: Machine, settings: dict[str, str]
) -> None:
    environment = serve_command(load(settings), machine).environment
    assert environment[ALLOCATOR] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("machine", "settings"),
    [
        (LAPTOP, {}),
        (with_gpu(L20), {"KT_DEVICE": "cpu"}),
        (with_gpu(L20), {"KT_TENSOR_PARALLEL_SIZE": "2"}),
        (replace(with_gpu(L20), wsl=True), {}),
        (with_gpu(replace(L20, virtual_memory=False)), {}),
        (with_gpu(L20), {"KT_EXTRA_ARGS": "--enable-memory-saver"}),
        (with_gpu(L20), {"KT_EXTRA_ARGS": "--disaggregation-mod=decode"}),
        (with_gpu(L20), {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        (with_gpu(L20), {ALLOCATOR: "backend:cudaMallocAsync"}),
    ],
)
def test_memory_that_does_not_grow(machine: Machine, settings: dict[str, str]) -> None:
    """Where it fails or has not been tried, and where the user has said something himself."""
    assert ALLOCATOR not in serve_command(load(settings), machine).environment


def test_the_allocators_options_in_an_env_file_are_handed_on(tmp_path: Path) -> None:
    file = tmp_path / "a.env"
    for name in (ALLOCATOR, "PYTORCH_ALLOC_CONF"):
        file.write_text(f"{name}=max_split_size_mb:64\n")
        environment = serve_command(load({}, [file], "serve"), with_gpu(L20)).environment
        found = {key: text for key, text in environment.items() if key.startswith("PYTORCH_")}
        assert found == {name: "max_split_size_mb:64"}


def test_booleans_and_none_leave_flags_out() -> None:
    argv = serve(
        KT_TRUST_REMOTE_CODE="no",
        KT_ENABLE_MIXED_CHUNK="0",
        KT_MAX_TOTAL_TOKENS="none",
        KT_ATTENTION_BACKEND="none",
        KT_REASONING_PARSER="none",
    )
    for flag in (
        "--trust-remote-code",
        "--enable-mixed-chunk",
        "--max-total-tokens",
        "--attention-backend",
        "--reasoning-parser",
    ):
        assert flag not in argv
    assert (
        value(serve(KT_MAX_DEFERRED_EXPERTS_PER_TOKEN="2"), "--kt-max-deferred-experts-per-token")
        == "2"
    )


def test_cpu_mode() -> None:
    command = serve_command(load({"PYTHONPATH": "/mine"}), LAPTOP)
    assert value(command.argv, "--device") == "cpu"
    assert value(command.argv, "--json-model-override-args") == '{"index_topk": null}'
    # CUDA graphs do not exist there; SGLang captures CPU graphs only with --enable-torch-compile.
    assert not [word for word in command.argv if "cuda-graph" in word]
    assert command.environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert command.environment["KT_DEVICE"] == "cpu"
    assert command.environment["PYTHONPATH"].endswith(":/mine")
    assert any("KT_DEVICE=auto is cpu: no NVIDIA GPU found" in note for note in command.notes)
    forced = serve_command(load({"KT_DEVICE": "cpu"}), with_gpu(L20))
    assert value(forced.argv, "--device") == "cpu"


@pytest.mark.parametrize(
    ("machine", "settings", "dense"),
    [
        (LAPTOP, {}, True),
        (with_gpu(L20), {}, True),
        (with_gpu(L20), {"KT_ATTENTION_BACKEND": "none"}, True),
        (with_gpu(L20), {"KT_DENSE_ATTENTION": "off"}, False),
        (with_gpu(H200), {}, False),
        (with_gpu(H200), {"KT_ATTENTION_BACKEND": "triton"}, True),  # cannot do sparse attention
        (with_gpu(replace(H200, compute_capability=(12, 0))), {}, True),
        (with_gpu(H200), {"KT_ATTENTION_BACKEND": "none"}, False),
        (with_gpu(H200), {"KT_ATTENTION_BACKEND": "dsa"}, False),
        (with_gpu(H200), {"KT_ATTENTION_BACKEND": "dsa", "KT_DENSE_ATTENTION": "on"}, True),
        (with_gpu(H200), {"KT_ATTENTION_BACKEND": "none", "KT_DEVICE": "cpu"}, True),
    ],
)
def test_dense_attention(machine: Machine, settings: dict[str, str], dense: bool) -> None:
    argv = serve(machine, **settings)
    assert ("--json-model-override-args" in argv) == dense


def test_model_overrides_are_merged() -> None:
    argv = serve(KT_MODEL_OVERRIDE_ARGS='{"num_hidden_layers": 4}')
    override = json.loads(value(argv, "--json-model-override-args") or "")
    assert override == {"index_topk": None, "num_hidden_layers": 4}
    argv = serve(KT_MODEL_OVERRIDE_ARGS='{"index_topk": 64}')
    assert json.loads(value(argv, "--json-model-override-args") or "") == {"index_topk": 64}


def test_speciale() -> None:
    argv = serve(LAPTOP, (TUTORIAL, SPECIALE))
    assert "--tool-call-parser" not in argv
    assert value(argv, "--reasoning-parser") == "deepseek-v3"
    assert value(argv, "--default-chat-template-kwargs") == '{"thinking": true}'
    assert value(argv, "--model") == "/path/to/deepseek-v3.2-speciale"
    # The model's name alone is enough.
    argv = serve(KT_MODEL_ID="deepseek-ai/DeepSeek-V3.2-Speciale")
    assert "--tool-call-parser" not in argv
    assert "--default-chat-template-kwargs" in argv
    argv = serve(
        KT_MODEL_ID="deepseek-ai/DeepSeek-V3.2-Speciale",
        KT_DEFAULT_THINKING="0",
        KT_TOOL_CALL_PARSER="deepseekv32",
    )
    assert value(argv, "--tool-call-parser") == "deepseekv32"
    assert "--default-chat-template-kwargs" not in argv


def test_auto_threads_and_pools() -> None:
    argv = serve(with_gpu(L20))
    assert value(argv, "--kt-cpuinfer") == "64"
    assert value(argv, "--kt-threadpool-count") == "2"
    limited = Machine(cpus=128, cores=64, numa_nodes=2, cpu_quota=7.5, gpu=None)
    assert value(serve(limited), "--kt-cpuinfer") == "7"
    tiny = Machine(cpus=128, cores=64, numa_nodes=2, cpu_quota=0.5, gpu=None)
    assert value(serve(tiny), "--kt-cpuinfer") == "1"
    assert value(serve(tiny), "--kt-threadpool-count") == "1"


def test_extra_args_come_last() -> None:
    argv = serve(KT_EXTRA_ARGS="--dtype float32 --log-level 'debug'")
    assert argv[-4:] == ["--dtype", "float32", "--log-level", "debug"]


@pytest.mark.parametrize(
    ("extra", "flag", "setting"),
    [
        ("--port 1", "--port", "KT_PORT"),
        ("--port=1", "--port", "KT_PORT"),
        ("--model-path /x", "--model-path", "KT_MODEL_PATH"),
        ("--tp-size 2", "--tp-size", "KT_TENSOR_PARALLEL_SIZE"),
        ("--dtype float32 --enable-metrics", "--enable-metrics", "KT_ENABLE_METRICS"),
        ("--json-model-override-args {}", "--json-model-override-args", "KT_MODEL_OVERRIDE_ARGS"),
        ("--api-key abc", "--api-key", "KT_API_KEY"),
        ("--admin-api-key=abc", "--admin-api-key", "KT_ADMIN_KEY"),
    ],
)
def test_extra_args_repeat_no_setting(extra: str, flag: str, setting: str) -> None:
    with pytest.raises(UserError) as caught:
        serve(KT_EXTRA_ARGS=extra)
    assert str(caught.value) == (
        f"KT_EXTRA_ARGS gives {flag}, which is {setting}'s: set {setting} instead"
    )


def test_extra_args_abbreviate_no_setting() -> None:
    """SGLang's parser takes any unambiguous beginning of a flag."""
    with pytest.raises(UserError, match="may be short for --admin-api-key of KT_ADMIN_KEY"):
        serve(KT_EXTRA_ARGS="--admin-api secret")
    with pytest.raises(UserError, match="may be short for --mem-fraction-static"):
        serve(KT_EXTRA_ARGS="--mem-frac 0.5")


def test_extra_args_cannot_turn_on_the_models_code() -> None:
    """It would run unknown to the download and to the checks."""
    for extra in ("--trust-remote-code", "--trust-remote"):
        with pytest.raises(UserError, match="KT_TRUST_REMOTE_CODE"):
            serve(KT_EXTRA_ARGS=extra)


def test_extra_args_may_give_what_no_setting_gives() -> None:
    argv = serve(KT_REASONING_PARSER="none", KT_EXTRA_ARGS="--reasoning-parser qwen3")
    assert argv[-2:] == ["--reasoning-parser", "qwen3"]


def test_secrets_are_neither_printed_nor_arguments() -> None:
    """All users of a host may read a process's arguments."""
    keys = {"KT_API_KEY": "sk-very-secret", "KT_ADMIN_KEY": "sk-more-secret"}
    for words_ in (("serve", "--print"), ("serve", "--print", "--json")):
        result = run(*words_, **keys, KT_DEVICE="cpu")
        assert result.returncode == 0
        assert "-secret" not in result.stdout + result.stderr
        assert "KT_ADMIN_KEY=***" in words(result.stdout) or "--json" in words_
    command = serve_command(load(keys), LAPTOP)
    assert "-secret" not in str(command.argv)
    assert {name: command.environment[name] for name in keys} == keys
    assert "KT_API_KEY" not in serve_command(load({}), LAPTOP).environment


def test_variables_of_env_files_reach_the_server(tmp_path: Path) -> None:
    file = tmp_path / "a.env"
    file.write_text("KT_TARGET=scalar\nSGLANG_X=1\nHF_TOKEN=hf_secret\nKT_PORT=1\n")
    command = serve_command(load({}, [file]), with_gpu(L20))
    hub = "HF_HUB_DISABLE_IMPLICIT_TOKEN"
    assert command.environment == {
        "KT_TARGET": "scalar",
        "SGLANG_X": "1",
        "KT_DEVICE": "cuda",
        hub: "1",
        ALLOCATOR: "expandable_segments:True",
    }
    with file.open("a") as lines:
        lines.write(f"{hub}=0\n")
    assert serve_command(load({}, [file]), with_gpu(L20)).environment[hub] == "0"
    assert hub not in serve_command(load({hub: "1"}), with_gpu(L20)).environment


def test_no_flag_twice() -> None:
    for stage in ("serve", "convert"):
        names = [name for _, flag in commanded(stage) for name in (flag.name, *flag.aliases)]
        assert len(names) == len(set(names))
