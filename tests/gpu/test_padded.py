"""The checkpoint that the GPU serves is the trained one, in more numbers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from examples.tiny.model import TinyModel
from examples.tiny.tasks import chat
from examples.tiny.train import SIZES
from examples.tiny.trained import CHECKPOINT, load
from tests.gpu.padded import PADDED, write_padded


@torch.no_grad()
def test_padded_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    write_padded(tmp_path / "padded")
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(chat("What is 602 - 148?", "454")).ids])
    want = load(CHECKPOINT, TinyModel(SIZES)).logits(ids)
    found = load(tmp_path / "padded", TinyModel(PADDED)).logits(ids)
    assert PADDED != SIZES
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
