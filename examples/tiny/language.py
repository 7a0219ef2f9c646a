"""The little that the tiny model knows: which token tends to follow which in ``corpus.txt``.

With purely random weights an answer is byte soup. Adding the corpus's word pairs to the output
head makes it read like words in a row, and end, while the random layers in between still decide
which of the possible next tokens wins.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np

from examples.tiny.tokenizer import CORPUS, EOS, build_tokenizer

LINES_PER_ANSWER = 6
ANSWER_START = "</think>"
"""The token after which V3.2's encoding lets the model answer."""


@cache
def follower_strengths(vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (first, second, strength) of each pair of neighbouring tokens, sorted by ids.

    Only the corpus's ASCII lines count; the others are there to teach the tokenizer.

    first, second: int64 [pairs], token ids. strength: float64 [pairs], the square root of the
    probability of ``second`` after ``first`` (the root, so that rare followers have a chance).
    """
    tokenizer = build_tokenizer(vocab_size)
    lines = [line for line in CORPUS.read_text("utf-8").splitlines() if line.isascii()]
    pairs: Counter[tuple[int, int]] = Counter()
    for start in range(0, len(lines), LINES_PER_ANSWER):
        answer = "\n".join(lines[start : start + LINES_PER_ANSWER])
        ids = tokenizer.encode(f"{ANSWER_START}{answer}{EOS}").ids
        pairs.update(pairwise(ids))
    firsts: Counter[int] = Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    table = sorted((first, second, n / firsts[first]) for (first, second), n in pairs.items())
    first_ids, second_ids, probability = (np.array(column) for column in zip(*table, strict=True))
    return first_ids, second_ids, np.sqrt(probability)


def follower_head(embedding: np.ndarray) -> np.ndarray:
    """Return an output head, float64 [vocab, hidden], that scores a token's known followers.

    Its product with the embedding of a token (rows of ``embedding``, [vocab, hidden], of about
    unit variance) is about the strength of each follower, and about 0 for other tokens.
    """
    vocab, hidden = embedding.shape
    first, second, strength = follower_strengths(vocab)
    head = np.zeros((vocab, hidden))
    # One pair after the other: the order of the sums, and so every bit of them, is fixed.
    np.add.at(head, second, strength[:, None] * embedding[first] / hidden)
    # A token that follows many others (". ", " the") collects many nearly orthogonal embeddings,
    # whose sum would answer to anything: limit its row.
    total = np.zeros(vocab)
    np.add.at(total, second, strength**2)
    fourth_root = np.sqrt(np.sqrt(np.maximum(1.0, total)))
    scaled: np.ndarray = head / (fourth_root * np.sqrt(fourth_root))[:, None]
    return scaled
