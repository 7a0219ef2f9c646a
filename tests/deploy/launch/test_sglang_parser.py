"""SGLang itself reads our command: the real parser and the real resolution of its arguments."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.launch.argv import serve_command
from deploy.settings.config import load
from deploy.settings.row import Setting
from deploy.settings.sglang_names import ATTENTION_BACKENDS, REASONING_PARSERS, TOOL_CALL_PARSERS
from deploy.settings.table import TABLE
from deploy.settings.variables import commanded
from examples.tiny.make_checkpoint import make_checkpoint
from kt_kernel.sglang_plugin import launch_environment
from tests.deploy.helpers import L20, LAPTOP, REPOSITORY, clean_environment, with_gpu

pytestmark = pytest.mark.slow

ASK_SGLANG = """
import argparse, contextlib, json, sys
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.arg_groups.overrides import resolving_view

jobs = json.load(sys.stdin)
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
options = {
    action.option_strings[0]: {
        "spellings": action.option_strings,
        "choices": sorted(action.choices) if action.choices else None,
    }
    for action in parser._actions if action.option_strings
}
with contextlib.redirect_stdout(sys.stderr):
    parsed = [vars(parser.parse_args(argv)) for argv in jobs["parse"]]
    args = prepare_server_args(jobs["resolve"])
    args.resolve_once()
    view = resolving_view(args)
    from sglang.srt.configs.model_config import ModelConfig, is_deepseek_dsa
    config = ModelConfig.from_server_args(args)
    resolved = {name: getattr(view, name) for name in jobs["fields"]}
    resolved["graphs"] = {
        phase: getattr(view.cuda_graph_config, phase).backend for phase in ("decode", "prefill")
    }
    resolved["sparse"] = is_deepseek_dsa(config.hf_config)
json.dump({"options": options, "parsed": parsed, "resolved": resolved}, sys.stdout, default=str)
"""

FIELDS = {
    "host": "127.0.0.1",
    "port": 30000,
    "kt_cpuinfer": 2,
    "kt_threadpool_count": 1,
    "kt_num_gpu_experts": 1,
    "kt_method": "AMXINT4",
    "attention_backend": "triton",
    "trust_remote_code": False,
    "mem_fraction_static": 0.98,
    "chunked_prefill_size": 4096,
    "max_running_requests": 32,
    "max_total_tokens": 40000,
    "served_model_name": "DeepSeek-V3.2",
    "enable_mixed_chunk": True,
    "tp_size": 1,
    "enable_p2p_check": True,
    "disable_shared_experts_fusion": True,
    "tool_call_parser": "deepseekv32",
    "reasoning_parser": "deepseek-v3",
    "watchdog_timeout": 1800.0,
    "enable_metrics": True,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def tutorial_argv() -> list[str]:
    command = serve_command(load({}, [REPOSITORY / "env" / "tutorial.env"]), with_gpu(L20))
    return command.argv[3:]


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory, tutorial_argv: list[str]) -> dict[str, Any]:
    """What SGLang makes of our commands, asked in one process because loading it takes long."""
    folder = tmp_path_factory.mktemp("sglang")
    make_checkpoint(folder / "model")
    settings = {
        "KT_MODEL_PATH": str(folder / "model"),
        "KT_WEIGHT_PATH": str(folder / "weights"),
        "KT_HOST": "127.0.0.1",
        "KT_DEVICE": "cpu",
        "KT_CPUINFER": "2",
        "KT_DECODE_CUDA_GRAPH": "0",
    }
    speciale = {
        "KT_MODEL_ID": "deepseek-ai/DeepSeek-V3.2-Speciale",
        "KT_MAX_DEFERRED_EXPERTS_PER_TOKEN": "2",
    }
    resolve = serve_command(load(settings), LAPTOP).argv[3:]
    # Off in CPU mode, but their effect does not depend on the device.
    resolve += ["--disable-prefill-cuda-graph", "--disable-decode-cuda-graph"]
    jobs = {
        "parse": [tutorial_argv, serve_command(load(speciale), LAPTOP).argv[3:]],
        "resolve": resolve,
        "fields": list(FIELDS),
    }
    result = subprocess.run(
        [sys.executable, "-c", ASK_SGLANG],
        input=json.dumps(jobs),
        text=True,
        env={**clean_environment(), **launch_environment("cpu", clean_environment())},
        cwd=folder,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_tutorials_command_is_understood(
    sglang: dict[str, Any], tutorial_argv: list[str]
) -> None:
    parsed = sglang["parsed"][0]
    expected = {
        **FIELDS,
        "host": "0.0.0.0",
        "kt_cpuinfer": 60,
        "kt_threadpool_count": 2,
        "trust_remote_code": True,
        "device": None,
    }
    assert {name: parsed[name] for name in expected} == expected
    assert parsed["model_path"] == "/path/to/deepseek-v3.2"
    assert parsed["kt_weight_path"] == "/path/to/deepseek-v3.2-INT4"
    assert json.loads(parsed["json_model_override_args"]) == {"index_topk": None}
    assert parsed["disable_prefill_cuda_graph"] is True
    assert parsed["disable_decode_cuda_graph"] is False


def test_the_other_flags_are_understood(sglang: dict[str, Any]) -> None:
    parsed = sglang["parsed"][1]
    assert parsed["default_chat_template_kwargs"] == {"thinking": True}
    assert parsed["tool_call_parser"] is None
    assert parsed["device"] == "cpu"
    assert parsed["kt_max_deferred_experts_per_token"] == 2


def test_resolution_changes_nothing_of_it(sglang: dict[str, Any]) -> None:
    resolved = sglang["resolved"]
    assert {name: resolved[name] for name in FIELDS} == FIELDS
    assert resolved["graphs"] == {"decode": "disabled", "prefill": "disabled"}
    assert resolved["sparse"] is False


@pytest.mark.parametrize("setting", [s for s, _ in commanded("serve")], ids=lambda s: s.name)
def test_spellings_are_complete(sglang: dict[str, Any], setting: Setting) -> None:
    """Else KT_EXTRA_ARGS could repeat a flag under another spelling."""
    flag = setting.flag("serve")
    assert flag is not None
    spellings = [o["spellings"] for o in sglang["options"].values() if flag.name in o["spellings"]]
    assert len(spellings) == 1, f"SGLang has no flag {flag.name}"
    assert sorted(spellings[0]) == sorted((flag.name, *flag.aliases))


def test_flags_that_settings_take_the_place_of_exist(sglang: dict[str, Any]) -> None:
    known = {n for o in sglang["options"].values() for n in o["spellings"]}
    replaced = {name for setting in TABLE for name in setting.instead_of}
    assert {"--api-key", "--admin-api-key"} <= replaced <= known


def test_no_other_flag_looks_like_an_abbreviation(sglang: dict[str, Any]) -> None:
    """KT_EXTRA_ARGS refuses beginnings of our flags; no real flag may be one by chance."""
    ours = {n for _, flag in commanded("serve") for n in (flag.name, *flag.aliases)}
    others = {n for o in sglang["options"].values() for n in o["spellings"]} - ours
    assert not {other for other in others for name in ours if name.startswith(other)} - {"-h"}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--attention-backend", ATTENTION_BACKENDS),
        ("--tool-call-parser", TOOL_CALL_PARSERS),
        ("--reasoning-parser", REASONING_PARSERS),
    ],
)
def test_names_of_its_parts_exist(
    sglang: dict[str, Any], flag: str, words: tuple[str, ...]
) -> None:
    assert set(words) <= set(sglang["options"][flag]["choices"])


def test_documented_flags_exist(sglang: dict[str, Any]) -> None:
    known = {n for o in sglang["options"].values() for n in o["spellings"]}
    for setting in TABLE:
        assert {w for w in shlex.split(setting.adds) if w.startswith("--")} <= known


def test_checkpoint_folder_is_a_real_one(tmp_path: Path) -> None:
    """The resolution above says something only if the checkpoint alone would be sparse."""
    make_checkpoint(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["index_topk"] > 0
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
