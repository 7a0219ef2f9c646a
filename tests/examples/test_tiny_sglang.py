"""Stock SGLang takes the tiny checkpoint for a DeepSeek V3.2 and formats its chats so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.tiny.config import TinySizes
from examples.tiny.tasks import chat
from examples.tiny.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow

# In a process of its own: importing SGLang registers classes with transformers for good.
ASK_SGLANG = """
import json, sys
from sglang.srt.configs.model_config import AttentionArch, ModelConfig, is_deepseek_dsa
from sglang.srt.entrypoints.openai.chat_encoding import (
    encode_simple_chat, resolve_chat_encoding_spec,
)
from sglang.srt.utils.hf_transformers import get_tokenizer

folder = sys.argv[1]
model = ModelConfig(model_path=folder, trust_remote_code=False)
tokenizer = get_tokenizer(folder, trust_remote_code=False)
encoding = resolve_chat_encoding_spec(hf_config=model.hf_config, tokenizer=tokenizer)

def chat(*messages, thinking_mode="chat"):
    messages = [dict(zip(("role", "content"), m)) for m in messages]
    ids = encode_simple_chat(
        tokenizer=tokenizer, spec=encoding, messages=messages, thinking_mode=thinking_mode
    )
    return tokenizer.convert_ids_to_tokens(ids)

answers = {
    "architectures": model.hf_config.architectures,
    "is_mla": model.attention_arch == AttentionArch.MLA,
    "is_dsa": is_deepseek_dsa(model.hf_config),
    "quantization": model.quantization,
    "layers": model.num_hidden_layers,
    "context_length": model.context_len,
    "eos": sorted(model.hf_eos_token_id),
    "rope_type": model.hf_config.rope_scaling["rope_type"],
    "chat_encoding": encoding,
    "chat_template": tokenizer.chat_template,
    "special_ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    "prompt": chat(("user", "hi")),
    "thinking_prompt": chat(("user", "hi"), thinking_mode="thinking"),
    "second_turn": chat(("user", "hi"), ("assistant", "you"), ("user", "hi")),
    "round_trip": tokenizer.decode(tokenizer.encode("Größe 你好 😀\\n  x = 1")),
}
print("ANSWERS " + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tiny_fp8: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", ASK_SGLANG, str(tiny_fp8)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [row for row in done.stdout.splitlines() if row.startswith("ANSWERS ")]
    found: dict[str, Any] = json.loads(line.removeprefix("ANSWERS "))
    return found


def test_model_is_taken_for_deepseek_v32(answers: dict[str, Any]) -> None:
    assert answers["architectures"] == ["DeepseekV32ForCausalLM"]
    assert answers["is_mla"]
    assert answers["is_dsa"], "sparse attention would not be chosen on a GPU"
    assert answers["quantization"] == "fp8"
    assert answers["layers"] == 5
    assert answers["context_length"] == 163840
    assert answers["rope_type"] == "yarn"
    assert answers["eos"] == [1]


def test_chats_are_formatted_by_the_v32_encoding(answers: dict[str, Any]) -> None:
    assert answers["chat_template"] is None
    assert answers["chat_encoding"] == "dsv32"
    # Five tokens, as the real model counts for this prompt: one <begin of sentence>, not two.
    prompt = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "hi", "<｜Assistant｜>"]
    assert answers["prompt"] == [*prompt, "</think>"]
    assert build_tokenizer(TinySizes().vocab_size).encode(chat("hi")).tokens == answers["prompt"]
    assert answers["thinking_prompt"] == [*prompt, "<think>"]
    assert answers["second_turn"] == [
        *[*prompt, "</think>", "you", "<｜end▁of▁sentence｜>"],
        *[*prompt[1:], "</think>"],
    ]


def test_tokenizer_survives_sglang(answers: dict[str, Any]) -> None:
    # SGLang may rebuild a tokenizer by its class name; a byte-level one must stay byte-level.
    assert answers["special_ids"] == [0, 1]
    assert answers["round_trip"] == "Größe 你好 😀\n  x = 1"
