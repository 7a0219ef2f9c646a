"""How many tile instructions a layer call takes: the closed form of its blocking."""

from __future__ import annotations

import pytest

from tests.amx import emulator
from tests.layers import RandomLayer, random_batch
from tests.shapes import LayerShape

pytestmark = pytest.mark.skipif(
    emulator.is_native() or not emulator.can_emulate(),
    reason="counts instructions while emulating them: for a CPU with AVX-512 VNNI and no AMX",
)


@pytest.mark.parametrize("tokens", [13, 16, 17, 32, 33, 100])
def test_products_and_loads(monkeypatch: pytest.MonkeyPatch, method: str, tokens: int) -> None:
    """ceil(M/16) x N/16 x K/64 products, at most one load for each, stores once for each result."""
    emulator.install()
    monkeypatch.setenv("KT_TARGET", "amx")
    shape = LayerShape(1, 1, 256, 192)
    wrapper = RandomLayer(shape).wrapper(method)
    before = emulator.counts()
    wrapper.forward(*random_batch(shape, tokens), 0)
    used = {kind: after - before[kind] for kind, after in emulator.counts().items()}
    blocks = -(-tokens // 16)
    panels = {"gate_up": (2 * 192 // 16, 256 // 64), "down": (256 // 16, 192 // 64)}
    results = blocks * sum(n for n, _ in panels.values())
    assert used["product"] == blocks * sum(n * k for n, k in panels.values())
    assert used["store"] == used["zero"] == results
    # Two panels share the loads of a row block, two row blocks those of the panels.
    full, single = divmod(blocks, 2)
    steps = sum(n // 2 * k for n, k in panels.values())
    assert used["load"] == steps * (4 * full + 3 * single)
    assert (
        used["load"] <= 1.5 * used["product"]
        if full == 0
        else used["load"] <= used["product"] * 1.25
    )
    assert used["loadconfig"] == used["release"]


def test_few_tokens_take_the_vector_kernels(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    emulator.install()
    monkeypatch.setenv("KT_TARGET", "amx")
    shape = LayerShape(1, 1, 256, 192)
    wrapper = RandomLayer(shape).wrapper(method)
    before = emulator.counts()
    wrapper.forward(*random_batch(shape, 4), 0)
    assert emulator.counts() == before
