"""The tiny checkpoint has DeepSeek V3.2's format and the values it is meant to have."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples.tiny import make_checkpoint as command
from examples.tiny.config import TinySizes
from examples.tiny.fp8 import dequantize_blocks, quantize_blocks
from examples.tiny.tensors import noise, tensor_specs, tensor_value

REPO_ROOT = Path(__file__).parents[2]

# The keys of the config.json that DeepSeek publishes with V3.2.
PUBLISHED_FIELDS = """
architectures attention_bias attention_dropout bos_token_id eos_token_id ep_size
first_k_dense_replace hidden_act hidden_size index_head_dim index_n_heads index_topk
initializer_range intermediate_size kv_lora_rank max_position_embeddings model_type
moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob
num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads
num_nextn_predict_layers q_lora_rank qk_nope_head_dim qk_rope_head_dim quantization_config
rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func tie_word_embeddings
topk_group topk_method torch_dtype transformers_version use_cache v_head_dim vocab_size
"""


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def expected_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Name and shape of each tensor a checkpoint of this config has, scales included."""
    shapes: dict[str, list[int]] = {}
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    heads, rope = config["num_attention_heads"], config["qk_rope_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    index_dim, index_heads = config["index_head_dim"], config["index_n_heads"]

    def quantized(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = [rows, columns]
        shapes[f"{name}.weight_scale_inv"] = [math.ceil(rows / 128), math.ceil(columns / 128)]

    def mlp(name: str, intermediate: int) -> None:
        quantized(f"{name}.gate_proj", intermediate, hidden)
        quantized(f"{name}.up_proj", intermediate, hidden)
        quantized(f"{name}.down_proj", hidden, intermediate)

    def layer(index: int) -> None:
        name = f"model.layers.{index}"
        shapes[f"{name}.input_layernorm.weight"] = [hidden]
        shapes[f"{name}.post_attention_layernorm.weight"] = [hidden]
        attention = f"{name}.self_attn"
        quantized(f"{attention}.q_a_proj", q_rank, hidden)
        shapes[f"{attention}.q_a_layernorm.weight"] = [q_rank]
        quantized(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
        quantized(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        shapes[f"{attention}.kv_a_layernorm.weight"] = [kv_rank]
        quantized(f"{attention}.kv_b_proj", heads * (nope + value), kv_rank)
        quantized(f"{attention}.o_proj", hidden, heads * value)
        quantized(f"{attention}.indexer.wq_b", index_heads * index_dim, q_rank)
        quantized(f"{attention}.indexer.wk", index_dim, hidden)
        shapes[f"{attention}.indexer.k_norm.weight"] = [index_dim]
        shapes[f"{attention}.indexer.k_norm.bias"] = [index_dim]
        shapes[f"{attention}.indexer.weights_proj.weight"] = [index_heads, hidden]
        if index < config["first_k_dense_replace"]:
            mlp(f"{name}.mlp", config["intermediate_size"])
            return
        experts, intermediate = config["n_routed_experts"], config["moe_intermediate_size"]
        shapes[f"{name}.mlp.gate.weight"] = [experts, hidden]
        shapes[f"{name}.mlp.gate.e_score_correction_bias"] = [experts]
        mlp(f"{name}.mlp.shared_experts", intermediate * config["n_shared_experts"])
        for expert in range(experts):
            mlp(f"{name}.mlp.experts.{expert}", intermediate)

    layers = config["num_hidden_layers"]
    assert config["num_nextn_predict_layers"] == 1
    for index in range(layers + 1):
        layer(index)
    shapes["model.embed_tokens.weight"] = [vocab, hidden]
    shapes["model.norm.weight"] = [hidden]
    shapes["lm_head.weight"] = [vocab, hidden]
    mtp = f"model.layers.{layers}"
    shapes[f"{mtp}.embed_tokens.weight"] = [vocab, hidden]
    shapes[f"{mtp}.shared_head.head.weight"] = [vocab, hidden]
    shapes[f"{mtp}.shared_head.norm.weight"] = [hidden]
    shapes[f"{mtp}.enorm.weight"] = [hidden]
    shapes[f"{mtp}.hnorm.weight"] = [hidden]
    shapes[f"{mtp}.eh_proj.weight"] = [hidden, 2 * hidden]
    return shapes


def test_config_has_exactly_the_published_fields(tiny_fp8: Path, tiny_bf16: Path) -> None:
    config = read_config(tiny_fp8)
    published = set(PUBLISHED_FIELDS.split())
    assert set(config) == published
    assert set(read_config(tiny_bf16)) == published - {"quantization_config"}
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    # Both kinds of layer, experts in groups of which only some are eligible, and room for a top-k.
    assert 1 < config["first_k_dense_replace"] < config["num_hidden_layers"] - 1
    assert config["topk_group"] < config["n_group"] < config["n_routed_experts"]
    # The packed expert format needs multiples of 64.
    assert config["hidden_size"] % 64 == config["moe_intermediate_size"] % 64 == 0


def test_transformers_reads_the_config(tiny_fp8: Path) -> None:
    from transformers import AutoConfig, DeepseekV32Config

    config = AutoConfig.from_pretrained(tiny_fp8)
    assert type(config) is DeepseekV32Config
    assert config.mlp_layer_types == ["dense", "dense", "sparse", "sparse", "sparse"]
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.num_local_experts == 16


def test_tensor_names_and_shapes_are_the_closed_form(tiny_fp8: Path, tiny_bf16: Path) -> None:
    expected = expected_shapes(read_config(tiny_fp8))
    stored = {name: list(t.shape) for name, t in load_tensors(tiny_fp8).items()}
    assert stored == expected
    unscaled = {n: s for n, s in expected.items() if not n.endswith("_scale_inv")}
    assert {name: list(t.shape) for name, t in load_tensors(tiny_bf16).items()} == unscaled


def test_same_recipe_at_real_sizes_has_the_real_number_of_tensors() -> None:
    real = TinySizes(num_hidden_layers=61, first_k_dense_replace=3, n_routed_experts=256)
    specs = list(tensor_specs(real))
    scales = sum(spec.kind == "linear" for spec in specs)
    # DeepSeek V3's published index lists 91991; V3.2 adds seven indexer tensors to each layer.
    assert len(specs) + scales == 91991 + 7 * 62


def test_only_what_the_publisher_quantises_is_quantised(tiny_fp8: Path) -> None:
    tensors = load_tensors(tiny_fp8)
    unquantized = re.compile(
        r"norm\.|(embed_tokens|lm_head|shared_head\.head|eh_proj|enorm|hnorm|mlp\.gate)\.|weights_proj"
    )
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv") or re.search(r"k_norm|e_score_correction_bias", name):
            assert tensor.dtype == torch.float32, name
        elif unquantized.search(name):
            assert tensor.dtype == torch.bfloat16, name
        else:
            assert tensor.dtype == torch.float8_e4m3fn, name
            assert name + "_scale_inv" in tensors


def test_shards_and_index_agree(tiny_fp8: Path) -> None:
    index = json.loads((tiny_fp8 / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tiny_fp8.glob("*.safetensors"))
    assert len(shards) >= 3
    assert shards[0] == f"model-00001-of-{len(shards):06d}.safetensors"
    found, nbytes = {}, 0
    for shard in shards:
        with safe_open(tiny_fp8 / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_tensor(name)
                found[name] = shard
                nbytes += tensor.numel() * tensor.element_size()
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == nbytes
    experts = {s for n, s in found.items() if "layers.2.mlp.experts." in n}
    assert len(experts) > 1, "no layer's experts span two shards"


def test_fp8_dequantises_to_the_intended_weights(tiny_fp8: Path) -> None:
    tensors = load_tensors(tiny_fp8)
    checked = 0
    for spec in tensor_specs(TinySizes()):
        intended = torch.from_numpy(tensor_value(spec, 0))
        stored = tensors[spec.name]
        if spec.kind != "linear":
            assert torch.equal(stored, intended.to(stored.dtype)), spec.name
            continue
        scales = tensors[spec.name + "_scale_inv"]
        mantissa, _ = torch.frexp(scales)
        assert bool((mantissa == 0.5).all()), f"{spec.name}: a scale is no power of two"
        # Written out, not by the function under test: block (i, j) has scale [i, j].
        rows, columns = torch.arange(spec.shape[0]) // 128, torch.arange(spec.shape[1]) // 128
        spread = scales[rows][:, columns]
        codes = stored.float()
        # Nearest value: half a step of three mantissa bits, or of the smallest subnormal.
        bound = torch.maximum(intended.abs() / 16, spread * 2.0**-10)
        assert bool(((codes * spread - intended).abs() <= bound).all()), spec.name
        for i, j in [(i, j) for i in range(scales.shape[0]) for j in range(scales.shape[1])]:
            largest = codes[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].abs().max()
            assert 224 <= largest <= 448, f"{spec.name} block {i},{j}: scale is not the smallest"
        checked += 1
    assert checked == sum(name.endswith("_scale_inv") for name in tensors)


def test_blocks_of_a_tensor_differ_in_scale(tiny_fp8: Path) -> None:
    tensors = load_tensors(tiny_fp8)
    scales = torch.stack(
        [
            t
            for n, t in tensors.items()
            if n.endswith("gate_proj.weight_scale_inv") and "experts" in n
        ]
    )
    assert scales.shape[1:] == (1, 2)
    assert (scales[:, 0, 0] != scales[:, 0, 1]).float().mean() > 0.3


def test_bf16_is_the_same_model_as_fp8(tiny_fp8: Path, tiny_bf16: Path) -> None:
    fp8, bf16 = load_tensors(tiny_fp8), load_tensors(tiny_bf16)
    for name, tensor in bf16.items():
        expected = fp8[name]
        if name + "_scale_inv" in fp8:
            expected = dequantize_blocks(expected, fp8[name + "_scale_inv"])
            assert torch.equal(tensor.float(), expected), name
        else:
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("shape", [(128, 128), (192, 256), (1, 1), (130, 300)])
def test_quantised_blocks_round_trip_values_that_fit(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn).float()
    exact[0, 0] = 448.0  # makes the first block's scale exactly one
    codes, scales = quantize_blocks(exact)
    assert scales[0, 0] == 1
    assert torch.equal(dequantize_blocks(codes, scales), exact)


def test_noise_is_pinned_to_its_bits() -> None:
    values = noise("model.norm.weight", (100, 100), 0)
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    assert digest == "08f13b5592926851dcac7b0f950047bf705c80fd9ce7be02125e6b3f8ae6c0a9"
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03


def test_same_seed_same_bytes_other_seed_other_weights(tiny_fp8: Path, tmp_path: Path) -> None:
    # Another process, hash seed and thread count must not show in the files.
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    for seed in ("0", "1"):
        command_line = [sys.executable, "-m", "examples.tiny.make_checkpoint"]
        command_line += ["--output", str(tmp_path / seed), "--seed", seed]
        subprocess.run(command_line, check=True, env=env, cwd=REPO_ROOT)
    names = sorted(path.name for path in tiny_fp8.iterdir())
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == names
    for name in names:
        first, same = (folder / name for folder in (tiny_fp8, tmp_path / "0"))
        assert first.read_bytes() == same.read_bytes(), name
    for name in [n for n in names if n.endswith(".safetensors")]:
        other = tmp_path / "1" / name
        assert (tiny_fp8 / name).read_bytes() != other.read_bytes(), name


def test_rerun_replaces_an_earlier_checkpoint(tiny_bf16: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "model-00009-of-000009.safetensors").write_bytes(b"stale")
    assert command.main(["--output", str(output), "--dtype", "bf16"]) == 0
    assert {p.name for p in output.iterdir()} == {p.name for p in tiny_bf16.iterdir()}


def test_folder_with_other_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    assert command.main(["--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "thesis.txt" in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert command.main(["--output", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write the checkpoint to {path}")


def test_model_runs_and_its_experts_matter(tiny_bf16: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bf16)
    model, report = AutoModelForCausalLM.from_pretrained(
        tiny_bf16, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith("model.layers.5.") for name in report["unexpected_keys"])

    text = (REPO_ROOT / "examples" / "tiny" / "corpus.txt").read_text()
    ids = torch.tensor([tokenizer.encode(text)[:256]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True)
        answer = model.generate(ids[:, :5], max_new_tokens=40, do_sample=False)[0, 5:]
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.zero_()
        without_experts = model(ids).logits
    assert bool(torch.isfinite(hidden.logits).all())
    for state in hidden.hidden_states:
        assert 0.5 < state.pow(2).mean().sqrt() < 5
    assert len(set(answer.tolist())) > 5, "greedy decoding repeats itself at once"
    changed = (without_experts.argmax(-1) != hidden.logits.argmax(-1)).float().mean()
    assert 0.1 < changed < 0.9, "a wrong expert would be hard to notice"
