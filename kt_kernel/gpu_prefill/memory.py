"""What the card's part of prompts takes of memory; the sizes that decide it."""

from __future__ import annotations

#: Packed experts on the card at once: what the bus brings during one layer's attention.
SLOTS = 16
#: Tokens of an expert that are multiplied at once; more come in pieces.
ROWS = 2048

#: Of each slice whose memory CUDA does not register: pinned buffers, and threads that fill them.
#: Smaller pieces put more host functions on the stream, of which it takes some 50 before the
#: calling thread has to wait; more threads find no idle CPU beside the workers.
STAGING_BUFFERS, STAGING_BUFFER_BYTES = 4, 8 << 20
STAGING_THREADS = 2

_BF16, _FP32 = 2, 4


def staging_bytes(slices: int) -> int:
    """Bytes of main memory for the staging buffers of so many slices."""
    return slices * STAGING_BUFFERS * STAGING_BUFFER_BYTES


def card_bytes(
    hidden_size: int, intermediate_size: int, bits_per_weight: float, tokens: int
) -> float:
    """Bytes on the card for calls of so many tokens.

    The ring's slots; one expert unpacked; rows of its inputs, of gate and up, between and of its
    output; and of each token the sum in float32 and the CPUs' part.

    Args:
        hidden_size, intermediate_size: H and I of an expert.
        bits_per_weight: of the packed weights, scales and table indices included.
        tokens: of the largest call.
    """
    h, i = hidden_size, intermediate_size
    ring = SLOTS * 3 * h * i * bits_per_weight / 8
    unpacked = 3 * h * i * _BF16
    rows = ROWS * (2 * h + 3 * i) * _BF16
    return ring + unpacked + rows + tokens * h * (_FP32 + _BF16)
