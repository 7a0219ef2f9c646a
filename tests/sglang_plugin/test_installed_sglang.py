"""The plugin in the installed SGLang: loaded as SGLang loads it, in a process of its own."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kt_kernel.sglang_plugin import launch_environment
from kt_kernel.sglang_plugin.edge.fields import FIELDS
from kt_kernel.sglang_plugin.hooks import HOOKS

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from kt_kernel.sglang_plugin import hooks

report = {}
load_plugins()
report["in_place"] = {hook.target: hooks.is_in_place(hook) for hook in hooks.HOOKS}

from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
report["attention"] = {
    name: AttentionBackendRegistry.get_handler(name)(None, None).name
    for name in ("torch_native", "triton")
}

from kt_kernel.sglang_plugin.activity import captures_graphs
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
off = PhaseConfig(backend=Backend.DISABLED)
report["graphs"] = [
    captures_graphs(type("ServerArgs", (), {"cuda_graph_config": config}))
    for config in (CudaGraphConfig(), CudaGraphConfig(decode=off, prefill=off))
]

# What users get from the detector that KT_TOOL_CALL_PARSER=auto chooses.
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
tools = [Tool(type="function", function=Function(name=name, parameters={})) for name in "fg"]
def parser(): return FunctionCallParser(tools, "deepseekv32")
text = sys.argv[1]
report["has_tool_call"] = [parser().has_tool_call(answer) for answer in (text, "no call")]
def told(prose, calls):
    calls = [(call.tool_index, call.name, json.loads(call.parameters)) for call in calls]
    return [prose, calls]
report["whole"] = told(*parser().parse_non_stream(text))
stream = parser()
pieces = [stream.parse_stream_chunk(character) for character in text]
report["streamed"] = told(
    "".join(prose for prose, _ in pieces), [call for _, calls in pieces for call in calls])
detector = stream.detector
report["left to send"] = [
    call["arguments"].removeprefix(sent) for call, sent in
    zip(detector.prev_tool_call_arr, detector.streamed_args_for_tool, strict=True)]
held = parser()
report["held"] = [held.parse_stream_chunk("text\\n\\n")[0], held.parse_stream_end()[0]]

# Every field of a route's body that may hold a number.
import dataclasses, typing
from fastapi.routing import APIRoute
from sglang.srt.entrypoints.http_server import app
from sglang.srt.sampling.sampling_params import SamplingParams
def has_number(annotation):
    if annotation in (int, float): return True
    return any(has_number(part) for part in typing.get_args(annotation))
def fields(annotation):
    for part in typing.get_args(annotation): yield from fields(part)
    if hasattr(annotation, "__annotations__"): yield from typing.get_type_hints(annotation).items()
numbers = {}
bodies = {
    (route.path, parameter.field_info.annotation) for route in app.routes
    if isinstance(route, APIRoute) for parameter in route.dependant.body_params}
for path, annotation in bodies | {("SamplingParams", SamplingParams)}:
    for name, kind in fields(annotation):
        if has_number(kind): numbers.setdefault(name, []).append(path)
report["numbers"] = numbers

# Another process, another SGLang: one that no longer has a target.
def broken(*args): ...
hooks.HOOKS.append(hooks.Hook(
    "sglang.srt.server_args.ServerArgs.renamed", "before", broken, "for this test", "always"))
hooks.install()
try:
    HookRegistry.apply_hooks()
except SystemExit as stop:
    report["status"] = stop.code
print("REPORT" + json.dumps(report))
"""


ELSEWHERE = {
    "size": "of a file, which Starlette counts",
    "server_args": "SGLang takes three of them, and compares",
    "shapes": "of weights to load: whoever may send those may do all",
    "added_tokens_config": "as for shapes, of an adapter",
    "decode_cuda_graph_bs": "of a disaggregated server, which this is none of",
    "decode_cuda_graph_memory_gb": "as for decode_cuda_graph_bs",
}
"""Numbers that the table of fields leaves to someone else, and why."""

MARK = "｜DSML｜"
ANSWER = (
    f'Let me see.\n\n<{MARK}function_calls>\n<{MARK}invoke name="f">\n'
    f'<{MARK}parameter name="old" string="true">    return 1\n</{MARK}parameter>\n'
    f'<{MARK}parameter name="count" string="false">2</{MARK}parameter>\n</{MARK}invoke>\n'
    f'<{MARK}invoke name="unknown">\n</{MARK}invoke>\n<{MARK}invoke name="g">\n</{MARK}invoke>'
)
"""With a call of a function that was not offered, and without the section's end tag."""


@cache
def outcome() -> tuple[dict[str, Any], str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, ANSWER],
        env={**os.environ, **launch_environment("cpu", {"PYTHONPATH": str(REPOSITORY)})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("REPORT")]
    return json.loads(line.removeprefix("REPORT")), result.stderr


def test_every_hook_takes() -> None:
    report, _ = outcome()
    assert report["in_place"] == {hook.target: True for hook in HOOKS}


def test_attention_is_absorbed_mla() -> None:
    report, _ = outcome()
    assert report["attention"] == {"torch_native": "MLA", "triton": "MLA"}


def test_graph_settings_are_where_they_are_looked_for() -> None:
    report, _ = outcome()
    assert report["graphs"] == [True, False]


def test_a_tool_call_is_the_same_whole_and_streamed() -> None:
    report, _ = outcome()
    calls = [[0, "f", {"old": "    return 1\n", "count": 2}], [1, "g", {}]]
    assert report["whole"] == ["Let me see.", calls]
    assert report["streamed"] == report["whole"]
    assert report["has_tool_call"] == [True, False]
    assert report["left to send"] == ["", ""]
    assert report["held"] == ["text", "\n\n"]


def test_every_number_of_every_route_has_a_range() -> None:
    """A field that a new SGLang adds is declared in the table, or here with the reason."""
    report, _ = outcome()
    assert {"top_k", "n", "stop_token_ids", "input_ids"} <= set(report["numbers"])
    missing = {n: where for n, where in report["numbers"].items() if n not in FIELDS | ELSEWHERE}
    assert missing == {}


def test_a_hook_that_fails_ends_the_process_with_its_name_and_the_version() -> None:
    from importlib.metadata import version

    report, stderr = outcome()
    assert report["status"] == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "sglang.srt.server_args.ServerArgs.renamed (before)" in line
    assert version("sglang") in line
