"""The tiny tokenizer has V3.2's special tokens, loses no text, and carries no chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from examples.tiny.config import TinySizes
from examples.tiny.tokenizer import BOS, CONTROL_TOKENS, EOS, MARKUP_TOKENS, build_tokenizer

PROMPT = f"{BOS}<｜User｜>hi<｜Assistant｜></think>"


@pytest.fixture(scope="module")
def tokenizer(tiny_fp8: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_fp8 / "tokenizer.json"))


def test_ids_match_the_config(tokenizer: Tokenizer, tiny_fp8: Path) -> None:
    config = json.loads((tiny_fp8 / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(config["vocab_size"]))
    assert tokenizer.token_to_id(BOS) == config["bos_token_id"] == 0
    assert tokenizer.token_to_id(EOS) == config["eos_token_id"] == 1
    assert tokenizer.token_to_id("<｜▁pad▁｜>") == 2


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *MARKUP_TOKENS])
def test_special_tokens_are_one_token_anywhere(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"a{token}b").ids
    assert ids == [
        tokenizer.token_to_id("a"),
        tokenizer.token_to_id(token),
        tokenizer.token_to_id("b"),
    ]


def test_decoding_drops_control_tokens_and_keeps_markup(tokenizer: Tokenizer) -> None:
    text = f"{BOS}<think>because</think>Paris<｜DSML｜function_calls>{EOS}"
    decoded = tokenizer.decode(tokenizer.encode(text).ids)
    assert decoded == "<think>because</think>Paris<｜DSML｜function_calls>"


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = CACHED.setdefault("tokenizer", build_tokenizer(TinySizes().vocab_size))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


CACHED: dict[str, Tokenizer] = {}


def test_words_are_shorter_than_bytes(tokenizer: Tokenizer) -> None:
    text = "The experts run on the processor, and the attention runs on the card."
    assert len(tokenizer.encode(text).ids) < len(text) / 3


def test_transformers_reads_it_as_published(tiny_fp8: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_fp8)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    # One <begin of sentence>, as the prompt has it: the tokenizer must not add its own.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(PROMPT)) == [
        BOS,
        "<｜User｜>",
        "hi",
        "<｜Assistant｜>",
        "</think>",
    ]


def test_there_is_no_chat_template(tiny_fp8: Path) -> None:
    for path in tiny_fp8.iterdir():
        assert "jinja" not in path.name
        if path.suffix == ".json":
            assert "chat_template" not in path.read_text("utf-8")
