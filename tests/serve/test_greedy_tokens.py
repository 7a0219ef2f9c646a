"""With float activations (target ``reference``) served tokens equal transformers' exactly."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve import reference_model
from tests.serve.server import Server

NEW_TOKENS = 24
MOE_ENDS = (2, 4)

pytestmark = pytest.mark.serve


# 0, 1 and 4 resident experts: each a different sum of resident experts' own weights and of packed
# weights, and a scaling factor on only one of the two changes the tokens.
@pytest.mark.parametrize(("method", "resident"), [("int4", 0), ("int8", 1), ("int4", 4)])
def test_greedy_tokens_are_equal(
    method: str,
    resident: int,
    serve: Callable[..., Server],
    checkpoint: Path,
    packed_weights: Callable[[str], Path],
    prompts: list[list[int]],
    measured: list[str],
) -> None:
    server = serve(method, resident, "reference")
    # At the same time, so that prefill and decode batches mix.
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: server.generate(prompt, NEW_TOKENS), prompts))
    served = [answer["output_ids"] for answer in answers]
    # The first and the last MoE layer were tested before the first request.
    for layer_idx in MOE_ENDS:
        assert f"self-test of layer {layer_idx}: " in server.log.read_text()

    model = reference_model.load(checkpoint, packed_weights(method), resident)
    expected = [reference_model.greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    equal = sum(
        a == b
        for left, right in zip(served, expected, strict=True)
        for a, b in zip(left, right, strict=True)
    )
    measured.append(
        f"{method}, {resident} resident experts, float activations: "
        f"{equal} of {len(prompts) * NEW_TOKENS} greedy tokens equal"
    )
    assert served == expected


def test_the_reference_tells_the_configurations_apart(
    checkpoint: Path, packed_weights: Callable[[str], Path], prompts: list[list[int]]
) -> None:
    """Otherwise equality would say nothing about the weights each expert used."""
    answers = set()
    for method, resident in [("int4", 0), ("int8", 1), ("int4", 4)]:
        model = reference_model.load(checkpoint, packed_weights(method), resident)
        tokens = [reference_model.greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
        answers.add(tuple(map(tuple, tokens)))
    assert len(answers) == 3
