"""The tiny checkpoint's tokenizer: byte-level BPE with DeepSeek's special tokens.

It has the structure of DeepSeek V3.2's tokenizer.json (same pre-tokeniser, decoder and special
tokens) and a small vocabulary, trained here on ``corpus.txt``. There is no chat template: V3.2
publishes none, and SGLang formats its chats with its own encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

CORPUS = Path(__file__).with_name("corpus.txt")

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

CONTROL_TOKENS = (BOS, EOS, PAD)
"""Ids 0, 1 and 2; dropped when an answer is decoded."""

MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
    "<｜search▁begin｜>",
    "<｜search▁end｜>",
    "｜DSML｜",
)
"""The last ids. Kept when an answer is decoded: SGLang's parsers look for them in the text."""

_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(vocab_size: int, lines: Iterable[str] | None = None) -> Tokenizer:
    """Train the tokenizer on ``lines`` (default: ``corpus.txt``); the same ones give the same one.

    Ids: control tokens, then bytes and merges, then placeholders where the corpus is too small
    for the vocabulary, then markup tokens; exactly ``vocab_size`` in total.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex(r"[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    trainer = BpeTrainer(
        vocab_size=vocab_size - len(MARKUP_TOKENS),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if lines is None:
        lines = CORPUS.read_text("utf-8").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer)

    missing = vocab_size - len(MARKUP_TOKENS) - tokenizer.get_vocab_size()
    placeholders = [f"<｜place▁holder▁no▁{i}｜>" for i in range(missing)]
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in (*placeholders, *MARKUP_TOKENS)]
    )
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """Return tokenizer_config.json, in the form DeepSeek publishes it and with no chat template."""

    def added(token: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": token, **flags}

    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": added(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": added(EOS),
        "legacy": True,
        "model_max_length": 131072,
        "pad_token": added(EOS),  # as published; PAD is in the vocabulary but unused
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``folder``."""
    text = tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text + "\n", "utf-8")
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", "utf-8")
