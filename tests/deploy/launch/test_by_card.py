"""What follows from the card, on cards as their drivers describe them, for V3.2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.checks.needs import V32_RESIDENT_BYTES, model_needs
from deploy.launch.argv import resolve, serve_command
from deploy.launch.by_card import memory_line, memory_of
from deploy.launch.gpu_memory import V32_CONFIG, GpuSizes
from deploy.settings.config import load
from kt_kernel.files.units import GIB
from kt_kernel.host.gpus import Gpu
from tests.deploy.helpers import REPOSITORY, Prepared, run, with_gpu

CUDA = (13, 0)


def card(name: str, gib: float, capability: tuple[int, int], multiprocessors: int) -> Gpu:
    return Gpu(
        name, int(gib * GIB), capability, CUDA, used_bytes=0, multiprocessors=multiprocessors
    )


# The memory is what CUDA tells of such a card; the multiprocessors are its maker's.
RTX_4090 = card("NVIDIA GeForce RTX 4090", 23.65, (8, 9), 128)
RTX_5090 = card("NVIDIA GeForce RTX 5090", 31.37, (12, 0), 170)
L20 = card("NVIDIA L20", 44.5, (8, 9), 92)
A100 = card("NVIDIA A100-SXM4-80GB", 79.25, (8, 0), 108)
H100 = card("NVIDIA H100 80GB HBM3", 79.11, (9, 0), 132)
H200 = card("NVIDIA H200", 139.8, (9, 0), 132)
B200 = card("NVIDIA B200", 178.4, (10, 0), 148)
CARDS = (RTX_4090, RTX_5090, L20, A100, H100, H200, B200)


@pytest.fixture
def v32(tmp_path: Path) -> Path:
    """A folder with V3.2's sizes in its ``config.json``."""
    (tmp_path / "config.json").write_text(json.dumps(dict(V32_CONFIG)))
    return tmp_path


def chosen(gpu: Gpu, **settings: str) -> dict[str, str | None]:
    """The flags that follow from the card, in the command of ``serve``."""
    argv = serve_command(load(settings), with_gpu(gpu)).argv
    flags = {
        "experts": "--kt-num-gpu-experts",
        "backend": "--attention-backend",
        "tokens": "--max-total-tokens",
        "override": "--json-model-override-args",
        "fraction": "--mem-fraction-static",
        "chunk": "--chunked-prefill-size",
        "requests": "--max-running-requests",
    }
    return {
        name: argv[argv.index(flag) + 1] if flag in argv else None for name, flag in flags.items()
    }


DENSE = {"backend": "triton", "override": '{"index_topk": null}'}
SPARSE = {"backend": "dsa", "override": None}
TUTORIAL = {"fraction": "0.98", "chunk": "4096", "requests": "32"}


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (
            RTX_4090,
            {**DENSE, "experts": "0", "tokens": "15000", "requests": "8", "chunk": "2048"},
        ),
        (RTX_5090, {**DENSE, "experts": "1", "tokens": "49000"}),
        (L20, {**DENSE, "experts": "3", "tokens": "163840"}),
        (A100, {**DENSE, "experts": "18", "tokens": "163840"}),
        (H100, {**SPARSE, "experts": "17", "tokens": "163840"}),
        (H200, {**SPARSE, "experts": "42", "tokens": "163840"}),
        (B200, {**SPARSE, "experts": "60", "tokens": "163840"}),
    ],
    ids=lambda value: value.name if isinstance(value, Gpu) else "",
)
def test_flags_of_each_card(v32: Path, gpu: Gpu, expected: dict[str, str | None]) -> None:
    assert chosen(gpu, KT_MODEL_PATH=str(v32)) == {**TUTORIAL, **expected}


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("graphs", ["0", "1"])
def test_what_is_chosen_fits_and_leaves_little(gpu: Gpu, graphs: str) -> None:
    values, notes = resolve(load({"KT_DECODE_CUDA_GRAPH": graphs}), with_gpu(gpu))
    found = memory_of(values, with_gpu(gpu))
    assert found is not None
    memory, free = found
    assert memory.total <= 0.98 * free
    # A step of tokens, or one expert more, would not fit.
    sizes = GpuSizes(V32_CONFIG)
    assert free - memory.total < 0.02 * free + sizes.experts(1) + 0.1 * GIB
    told = [note for note in notes if gpu.name in note]
    assert [note.split("=")[0] for note in told][-2:] == [
        "KT_NUM_GPU_EXPERTS",
        "KT_MAX_TOTAL_TOKENS",
    ]


def test_the_tutorials_numbers() -> None:
    """27 GB with 1 expert of each layer and 40000 tokens, as its authors saw on an L20, and what
    the decode's partial sums have taken since SGLang makes room for more of them."""
    env_file = REPOSITORY / "env" / "tutorial.env"
    values, _ = resolve(load({}, [env_file]), with_gpu(L20))
    found = memory_of({**values, "KT_GPU_PREFILL_TOKEN_THRESHOLD": None}, with_gpu(L20))
    assert found is not None
    partial_sums = 32 * 128 * (128 - 8) * 513 * 4 / GIB
    assert found[0].total / GIB == pytest.approx(27 + partial_sums, abs=0.6)
    assert memory_line(values, with_gpu(L20)) == (
        "memory of GPU: weights 19.7 + resident experts 2.4 + KV 2.6 + workspace 4.4 "
        "= 29.1 GiB of 44.5"
    )


def test_what_the_user_sets_stays() -> None:
    assert chosen(RTX_4090, KT_MAX_TOTAL_TOKENS="40000")["tokens"] == "40000"
    assert chosen(RTX_4090, KT_NUM_GPU_EXPERTS="1")["experts"] == "1"
    # One given, the other follows.
    assert chosen(L20, KT_NUM_GPU_EXPERTS="6")["tokens"] == "80000"
    assert chosen(L20, KT_MAX_TOTAL_TOKENS="40000")["experts"] == "7"
    assert chosen(L20, KT_MAX_TOTAL_TOKENS="none")["experts"] == "1"
    assert chosen(H200, KT_DENSE_ATTENTION="on")["backend"] == "triton"
    assert chosen(L20, KT_DENSE_ATTENTION="off")["backend"] == "dsa"
    assert chosen(H200, KT_ATTENTION_BACKEND="triton")["override"] == '{"index_topk": null}'
    assert chosen(H200, KT_ATTENTION_BACKEND="none")["override"] is None
    # A smaller share of the card, a smaller chunk, memory in use: all count.
    assert chosen(L20, KT_MEM_FRACTION_STATIC="0.7")["tokens"] == "129000"
    small = chosen(RTX_4090, KT_CHUNKED_PREFILL_SIZE="1024")
    assert (small["requests"], small["tokens"]) == ("8", "23000")
    assert chosen(RTX_4090, KT_MAX_RUNNING_REQUESTS="16")["chunk"] == "2048"
    assert chosen(replace(L20, used_bytes=16 * GIB))["tokens"] == "58000"


def test_several_gpus_share_the_weights() -> None:
    one, two = (GpuSizes(V32_CONFIG, gpus=gpus) for gpus in (1, 2))
    # Heads, experts and embeddings are divided; latents, router and norms are on each.
    assert 0.5 * one.weights() < two.weights() < 0.56 * one.weights()
    assert two.experts(4) == one.experts(4) / 2
    assert two.cache_per_token == one.cache_per_token
    both = replace(RTX_4090, count=2)
    settings = {"KT_TENSOR_PARALLEL_SIZE": "2"}
    assert chosen(both, **settings)["tokens"] == "127000"
    values, _ = resolve(load(settings), with_gpu(both))
    line = memory_line(values, with_gpu(both)) or ""
    assert line.startswith("memory of each GPU: weights 10.")


def test_weights_are_those_of_the_checkpoint(prepared: Prepared) -> None:
    """The formulas against the bytes of real tensors, and of V3.2's."""
    config = json.loads((prepared.model / "config.json").read_text())
    for fields, held in (
        (config, model_needs(prepared.model).resident),
        (V32_CONFIG, V32_RESIDENT_BYTES),
    ):
        sizes = GpuSizes(fields, sparse=True)
        heads = fields["num_attention_heads"] * (fields["qk_nope_head_dim"] + fields["v_head_dim"])
        # SGLang's own: the absorbed halves of kv_b_proj, and the indexer's wk in bf16.
        absorbed = heads * fields["kv_lora_rank"] * 2
        keys = fields["hidden_size"] * fields["index_head_dim"]
        ours = sizes.weights() - sizes.layers * (absorbed + keys)
        assert ours == pytest.approx(held, rel=0.01)


def test_caches() -> None:
    """Bytes for each token as SGLang's pool_configurator counts them."""
    assert GpuSizes(V32_CONFIG).cache_per_token == 61 * 576 * 2
    assert GpuSizes(V32_CONFIG, sparse=True).cache_per_token == 61 * (576 * 2 + 132)
    both = GpuSizes(V32_CONFIG, sparse=True, fp8_cache=True)
    assert both.cache_per_token == 61 * (576 + 132)


def test_a_model_without_an_indexer_is_dense(tmp_path: Path) -> None:
    """R1's config, for one, knows no index_topk; its attention is dense on Hopper, too."""
    r1 = {name: value for name, value in V32_CONFIG.items() if not name.startswith("index_")}
    (tmp_path / "config.json").write_text(json.dumps(r1))
    found = chosen(H200, KT_MODEL_PATH=str(tmp_path))
    assert (found["backend"], found["experts"]) == ("triton", "42")


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": "many"}', '{"hidden_size": 7168}'])
def test_a_config_that_cannot_be_used_counts_as_v32(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert chosen(L20, KT_MODEL_PATH=str(tmp_path)) == chosen(L20)
    unusable = {**V32_CONFIG, "hidden_size": "many", "index_topk": None}
    (tmp_path / "config.json").write_text(json.dumps(unusable))
    assert chosen(H200, KT_MODEL_PATH=str(tmp_path)) == chosen(H200)


def test_a_small_model_takes_the_tutorials_values(prepared: Prepared) -> None:
    found = chosen(L20, KT_MODEL_PATH=str(prepared.model))
    assert (found["experts"], found["tokens"]) == ("1", "40000")


def test_check_prints_the_sum_as_json(prepared: Prepared) -> None:
    report = json.loads(
        run("check", "--json", KT_DEVICE="cpu", KT_MODEL_PATH=str(prepared.model)).stdout
    )
    assert report["gpu_memory"] is None


@pytest.mark.parametrize("gpu", CARDS[:-1], ids=lambda gpu: gpu.name)
def test_the_docs_say_what_is_chosen(gpu: Gpu) -> None:
    values, _ = resolve(load({}), with_gpu(gpu))
    found = memory_of(values, with_gpu(gpu))
    assert found is not None
    kind = "dense" if values["KT_DENSE_ATTENTION"] == "on" else "sparse"
    tokens = f"{values['KT_MAX_TOTAL_TOKENS']:,}".replace(",", " ")
    row = (
        f"({found[1] / GIB:.1f}) | {kind}, `{values['KT_ATTENTION_BACKEND']}` "
        f"| {values['KT_NUM_GPU_EXPERTS']} | {tokens} | {found[0].total / GIB:.1f} |"
    )
    assert row in (REPOSITORY / "docs" / "gpu-memory.md").read_text("utf-8")
