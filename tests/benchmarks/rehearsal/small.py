"""The rehearsal's command with small sizes and, given FAKE or HANG first, no real server."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType

from benchmarks import limits
from benchmarks.rehearsal import __main__ as command
from benchmarks.rehearsal import checkpoint, measures, packed_layers, plan, result, variant
from benchmarks.server import Server
from examples.tiny.config import TinySizes
from kt_kernel.packed import PackedLayout

VOCABULARY = 4096


def with_moe_layers(count: int) -> TinySizes:
    return TinySizes(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=2 + count,
        num_nextn_predict_layers=0,
        n_routed_experts=256,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
    )


def layout(method: str) -> PackedLayout:
    return PackedLayout(256, 256, 128, method)


def replace(module: ModuleType, name: str, value: object) -> None:
    assert hasattr(module, name)
    setattr(module, name, value)


def patch() -> None:
    """Small sizes in place of V3.2's."""
    packed_layers.DRAWN, checkpoint.DRAWN = 1 << 22, (1 << 20) - 3
    replace(command, "with_moe_layers", with_moe_layers)
    replace(plan, "v32_layout", layout)
    replace(result, "v32_layout", layout)
    replace(measures, "config_of", lambda count: {"vocab_size": VOCABULARY})


if __name__ == "__main__":
    patch()
    kind, *argv = sys.argv[1:]
    if kind in ("FAKE", "HANG", "DIE"):
        fake = [sys.executable, str(Path(__file__).with_name("fake_server.py")), kind]
        replace(variant, "Server", functools.partial(Server, command=fake))
        replace(limits, "read_bandwidth", lambda threads, seconds: limits.Measured(50, 49, 0))
    sys.exit(command.main(argv))
