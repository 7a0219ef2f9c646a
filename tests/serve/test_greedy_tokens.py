"""With float activations (target ``reference``) served tokens equal transformers' exactly."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.server import Server
from kt_kernel.placement.metrics import METRIC, PAUSE, Pairs
from tests.serve import reference_model

NEW_TOKENS = 24
MOE_ENDS = (2, 4)
#: Method and resident experts. 0, 1 and 4 resident experts: each a different sum of resident
#: experts' own weights and of packed weights, and a scaling factor on only one of the two changes
#: the tokens.
CONFIGURATIONS = [("int4", 0), ("int8", 1), ("int4", 4)]
#: The last one's prompts are divided with a card, for which the CPU stands in; to it experts go
#: through staging buffers.
DIVIDED = {
    "_KT_GPU_PREFILL_STAND_IN": "float32",
    "KT_GPU_PREFILL_TOKEN_THRESHOLD": "32",
    "_KT_GPU_PREFILL_STAGING": "1",
}

pytestmark = pytest.mark.serve


@pytest.mark.parametrize("index", range(3), ids=lambda i: "-".join(map(str, CONFIGURATIONS[i])))
def test_greedy_tokens_are_equal(
    index: int,
    serve: Callable[..., Server],
    checkpoint: Path,
    packed_weights: Callable[[str], Path],
    prompts: list[list[int]],
    measured: list[str],
) -> None:
    method, resident = CONFIGURATIONS[index]
    divided = DIVIDED if index == 2 else {}
    server = serve(method, resident, "reference", **divided)
    # At the same time, so that prefill and decode batches mix.
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: server.generate(prompt, NEW_TOKENS), prompts))
    served = [answer["output_ids"] for answer in answers]
    assert {len(tokens) for tokens in served} == {NEW_TOKENS}
    # The first and the last MoE layer were tested before the first request.
    for layer_idx in MOE_ENDS:
        assert f"self-test of layer {layer_idx}: " in server.log.read_text()
    assert server.log.read_text().count("go to the card through staging buffers") == bool(divided)
    pairs = routed_pairs(server)
    assert [pairs[where] > 0 for where in Pairs._fields] == [resident > 0, bool(divided), True]
    server.stop()

    def equal_tokens(method: str, resident: int) -> int:
        """How many served tokens are those that transformers holds most likely at their place.

        All are if and only if its greedy answer is the served one.
        """
        model = reference_model.load(checkpoint, packed_weights(method), resident)
        return sum(
            token == likely
            for prompt, tokens in zip(prompts, served, strict=True)
            for token, likely in zip(
                tokens, reference_model.most_likely(model, prompt, tokens), strict=True
            )
        )

    equal, total = equal_tokens(method, resident), len(prompts) * NEW_TOKENS
    measured.append(
        f"{method}, {resident} resident experts, float activations: "
        f"{equal} of {total} greedy tokens equal"
    )
    assert equal == total
    # Otherwise equality would say nothing about the weights each expert used.
    assert equal_tokens(*CONFIGURATIONS[index - 1]) < total


def routed_pairs(server: Server) -> dict[str, float]:
    """The metric once it has been updated after the last request."""
    deadline = time.monotonic() + 60
    before: dict[str, float] | None = None
    while time.monotonic() < deadline:
        lines = re.findall(rf'^{METRIC}_total{{where="(\w+)"}} (\S+)$', server.metrics(), re.M)
        now = {where: float(value) for where, value in lines}
        if now == before and any(now.values()):
            return now
        before = now
        time.sleep(1.1 * PAUSE)
    raise AssertionError(f"the metric was not updated: {before}")
