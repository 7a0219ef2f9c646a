"""What quantising activations to 8 bits changes in the served distributions, bounded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.server import Server
from tests.serve import reference_model

pytestmark = pytest.mark.serve


@pytest.mark.parametrize(("method", "resident"), [("int4", 1), ("int8", 0)])
def test_top1_agreement_and_divergence(
    method: str,
    resident: int,
    serve: Callable[..., Server],
    checkpoint: Path,
    packed_weights: Callable[[str], Path],
    prompts: list[list[int]],
    measured: list[str],
) -> None:
    server = serve(method, resident)
    model = reference_model.load(checkpoint, packed_weights(method), resident)
    agreements, divergences = [], []
    for prompt in prompts[2:]:
        expected = reference_model.log_probabilities(model, prompt)[:-1]
        served = served_log_probabilities(server, prompt, expected.shape[1])
        agreements.append(served.argmax(-1) == expected.argmax(-1))
        divergences.append((expected.exp() * (expected - served)).sum(-1))
    agreement = torch.cat(agreements).float().mean().item()
    divergence = torch.cat(divergences)
    measured.append(
        f"{method}, {resident} resident experts, 8-bit activations: top-1 agreement "
        f"{agreement:.1%}, KL per position mean {divergence.mean():.2e}, "
        f"median {divergence.median():.2e}, largest {divergence.max():.2e} "
        f"({len(divergence)} positions)"
    )
    # Measured: 97.3% and 98.5%, median 3e-4 and 4e-4, mean 1.4e-2. The mean is that of a few
    # positions where the rounding tips the router to another expert.
    assert agreement >= 0.95
    assert divergence.median() <= 2e-3
    assert divergence.mean() <= 5e-2


def served_log_probabilities(server: Server, prompt: list[int], vocabulary: int) -> torch.Tensor:
    """float32 [T - 1, vocabulary]: row t is the served distribution of token t + 1."""
    answer = server.generate(
        prompt, 1, return_logprob=True, logprob_start_len=0, top_logprobs_num=vocabulary
    )
    rows = answer["meta_info"]["input_top_logprobs"][1:]
    result = torch.full((len(rows), vocabulary), float("nan"))
    for row, entries in zip(result, rows, strict=True):
        for log_probability, token, _ in entries:
            row[token] = log_probability
    assert not result.isnan().any()
    return result
