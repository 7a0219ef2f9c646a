"""Counted experts on the GPU: the tokens are those of the model with these experts resident."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.server import Server
from kt_kernel import packed
from kt_kernel.files.safetensors_header import read_header
from kt_kernel.placement.counts import Model, expert_order, share_of
from kt_kernel.placement.counts_file import add_counts, read_counts
from tests.serve import reference_model

NEW_TOKENS = 24
EXPERTS, TOP_K, RESIDENT = 16, 4, 3
#: Of each MoE layer: none is among the first, one layer has none of the others'.
HOT = {2: [5, 9, 14], 3: [3, 12, 15], 4: [4, 5, 6]}

pytestmark = pytest.mark.serve


def test_measured_placement(
    serve: Callable[..., Server],
    checkpoint: Path,
    packed_weights: Callable[[str], Path],
    prompts: list[list[int]],
    tmp_path: Path,
    measured: list[str],
) -> None:
    """SGLang moves experts, their weights and the router's ids; counts stay the checkpoint's."""
    weights, path = packed_weights("int4"), tmp_path / "counts.json"
    header = read_header(weights / packed.layer_file_name(2))
    model = Model(header.metadata["source_fingerprint"], EXPERTS)
    before = {layer: np.bincount(hot, minlength=EXPERTS) for layer, hot in HOT.items()}
    assert {layer: expert_order(of, RESIDENT)[:RESIDENT] for layer, of in before.items()} == HOT
    add_counts(path, model, before)
    server = serve(
        *("int4", RESIDENT, "reference"),
        KT_EXPERT_PLACEMENT="measured",
        KT_EXPERT_COUNTS=str(path),
        # Its tokens would be counted, too.
        KT_EXTRA_ARGS="--dtype float32 --sleep-on-idle --skip-server-warmup",
    )
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: server.generate(prompt, NEW_TOKENS), prompts))
    served = [answer["output_ids"] for answer in answers]

    reference = reference_model.load(checkpoint, weights, HOT)
    want = {layer: of.copy() for layer, of in before.items()}
    for prompt, tokens in zip(prompts, served, strict=True):
        assert tokens == reference_model.most_likely(reference, prompt, tokens)
        for layer, ids in reference_model.routed(reference, prompt + tokens[:-1]).items():
            want[layer] += np.bincount(ids.flatten().numpy(), minlength=EXPERTS)
    first = reference_model.load(checkpoint, weights, RESIDENT)
    assert served != [
        reference_model.most_likely(first, prompt, tokens)
        for prompt, tokens in zip(prompts, served, strict=True)
    ], "other experts are as good: equality would say nothing"

    # A batch that was under way when a request's last token was found has computed one more.
    spare = len(prompts) * TOP_K
    deadline = time.monotonic() + 90
    while not all((read_counts(path, model)[i] >= want[i]).all() for i in want):
        assert time.monotonic() < deadline, "the counts were not saved"
        time.sleep(0.2)
    found = read_counts(path, model)
    server.stop()
    for layer, of in found.items():
        assert (of >= want[layer]).all()
        assert of.sum() - want[layer].sum() <= spare
    share = share_of(found, RESIDENT)
    measured.append(
        f"random tiny model, {RESIDENT} of {EXPERTS} experts resident: {share.first:.1%} of "
        f"{share.pairs} pairs with the first, {share.measured:.1%} with the most used"
    )
