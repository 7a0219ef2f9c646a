"""Names, shapes, dtypes and values of the tiny checkpoint's tensors.

``tensor_specs`` is the closed form: the set of tensors a DeepSeek V3.2 checkpoint of these sizes
has, and which of them the publisher quantises. ``tensor_value`` gives the intended values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from examples.tiny.config import BLOCK, TinySizes
from examples.tiny.language import follower_head

SCALE_SUFFIX = "_scale_inv"

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

RESIDUAL_GAIN = 0.3
"""Factor on projections that add to the residual stream, as deep models are initialised: five
layers together then weigh about as much as the embedding they are added to."""

HEAD_SIGNAL, HEAD_NOISE = 64.0, 1.6
"""Size in logits of the head's knowledge and of its random part."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint.

    ``kind`` says how it is stored: "linear" is quantised in an FP8 checkpoint (FP8 codes plus a
    float32 scale per block, named ``<name>_scale_inv``) and bfloat16 otherwise; "bf16" and "f32"
    are stored so in every checkpoint. Values are ``center`` + noise of standard deviation ``std``.
    ``copy_of`` names the tensor that this one repeats, if any.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    std: float
    center: float = 0.0
    copy_of: str = ""

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of a "linear" tensor's block scales; the last block of a dimension may be cut."""
        rows, columns = self.shape
        return -(-rows // BLOCK), -(-columns // BLOCK)


def tensor_specs(sizes: TinySizes) -> Iterator[TensorSpec]:
    """Yield every tensor of the checkpoint in file order (without the ``_scale_inv`` ones)."""
    hidden, vocab = sizes.hidden_size, sizes.vocab_size
    yield TensorSpec(EMBEDDING, (vocab, hidden), "bf16", 1.0)
    for layer in range(sizes.num_hidden_layers):
        yield from _decoder_layer(sizes, layer, moe=layer in sizes.moe_layers)
    yield _norm("model.norm", hidden)
    yield TensorSpec(HEAD, (vocab, hidden), "bf16", HEAD_NOISE * hidden**-0.5)
    for layer in sizes.mtp_layers:
        prefix = f"model.layers.{layer}"
        # The published file repeats the main model's embedding and head in the MTP layer.
        embedding = f"{prefix}.embed_tokens.weight"
        yield TensorSpec(embedding, (vocab, hidden), "bf16", 1.0, copy_of=EMBEDDING)
        yield _norm(f"{prefix}.enorm", hidden)
        yield _norm(f"{prefix}.hnorm", hidden)
        # Not quantised by the publisher, although it is a plain linear layer.
        std = (2 * hidden) ** -0.5
        yield TensorSpec(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), "bf16", std)
        yield from _decoder_layer(sizes, layer, moe=True)
        yield _norm(f"{prefix}.shared_head.norm", hidden)
        head = f"{prefix}.shared_head.head.weight"
        std = HEAD_NOISE * hidden**-0.5
        yield TensorSpec(head, (vocab, hidden), "bf16", std, copy_of=HEAD)


def _decoder_layer(sizes: TinySizes, layer: int, *, moe: bool) -> Iterator[TensorSpec]:
    hidden = sizes.hidden_size
    prefix = f"model.layers.{layer}"
    yield _norm(f"{prefix}.input_layernorm", hidden)
    yield from _attention(sizes, f"{prefix}.self_attn")
    yield _norm(f"{prefix}.post_attention_layernorm", hidden)
    if not moe:
        yield from _mlp(f"{prefix}.mlp", hidden, sizes.intermediate_size)
        return
    experts = sizes.n_routed_experts
    yield TensorSpec(f"{prefix}.mlp.gate.weight", (experts, hidden), "bf16", 2 * hidden**-0.5)
    yield TensorSpec(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), "f32", 0.1)
    for expert in range(experts):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, sizes.moe_intermediate_size)
    shared = sizes.n_shared_experts * sizes.moe_intermediate_size
    yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, shared)


def _attention(sizes: TinySizes, prefix: str) -> Iterator[TensorSpec]:
    heads, hidden, rope = sizes.num_attention_heads, sizes.hidden_size, sizes.qk_rope_head_dim
    q_rank, kv_rank = sizes.q_lora_rank, sizes.kv_lora_rank
    yield _linear(f"{prefix}.q_a_proj", q_rank, hidden)
    yield _norm(f"{prefix}.q_a_layernorm", q_rank)
    yield _linear(f"{prefix}.q_b_proj", heads * (sizes.qk_nope_head_dim + rope), q_rank)
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield _norm(f"{prefix}.kv_a_layernorm", kv_rank)
    yield _linear(
        f"{prefix}.kv_b_proj", heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), kv_rank
    )
    yield _linear(f"{prefix}.o_proj", hidden, heads * sizes.v_head_dim, RESIDUAL_GAIN)
    indexer = f"{prefix}.indexer"
    yield _linear(f"{indexer}.wq_b", sizes.index_n_heads * sizes.index_head_dim, q_rank)
    yield _linear(f"{indexer}.wk", sizes.index_head_dim, hidden)
    yield TensorSpec(f"{indexer}.k_norm.weight", (sizes.index_head_dim,), "f32", 0.1, 1.0)
    yield TensorSpec(f"{indexer}.k_norm.bias", (sizes.index_head_dim,), "f32", 0.1)
    weights_proj = f"{indexer}.weights_proj.weight"
    yield TensorSpec(weights_proj, (sizes.index_n_heads, hidden), "bf16", hidden**-0.5)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield _linear(f"{prefix}.gate_proj", intermediate, hidden)
    yield _linear(f"{prefix}.up_proj", intermediate, hidden)
    yield _linear(f"{prefix}.down_proj", hidden, intermediate, RESIDUAL_GAIN)


def _linear(name: str, out_features: int, in_features: int, gain: float = 1.0) -> TensorSpec:
    # Variance 1 / fan-in keeps the size of activations from layer to layer.
    std = gain * in_features**-0.5
    return TensorSpec(f"{name}.weight", (out_features, in_features), "linear", std)


def _norm(name: str, size: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (size,), "bf16", 0.1, 1.0)


def noise(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return float64 noise of mean 0 and variance 1, a function of its arguments only.

    The sum of four 16-bit uniform integers: nearly Gaussian, and exact integer arithmetic on a
    generator whose raw stream NumPy guarantees, so it is the same on every machine and version
    (NumPy does not promise that for ``standard_normal``).
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(key, "little")).random_raw(int(np.prod(shape)))
    total = np.zeros(bits.shape, dtype=np.int64)
    for shift in (0, 16, 32, 48):
        total += ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    # Each term is uniform on 0..65535: mean 32767.5, variance (2**32 - 1) / 12.
    values: np.ndarray = (total - 4 * 32767.5) / np.sqrt((2.0**32 - 1) / 3)
    return values.reshape(shape)


def tensor_value(spec: TensorSpec, seed: int) -> np.ndarray:
    """Return the intended values of a tensor (float32, ``spec.shape``), before any rounding.

    The blocks of a "linear" tensor get different magnitudes (1/2, 1 or 2 times), so that a reader
    which applies the wrong block's scale is off by a factor that no test can miss.
    """
    source = spec.copy_of or spec.name
    values = noise(source, spec.shape, seed) * spec.std + spec.center
    if source == HEAD:
        values += HEAD_SIGNAL * follower_head(noise(EMBEDDING, spec.shape, seed))
    if spec.kind == "linear":
        steps = np.clip(np.rint(noise(f"{spec.name}/blocks", spec.scale_shape, seed)), -1, 1)
        gains = np.repeat(np.repeat(np.exp2(steps), BLOCK, axis=0), BLOCK, axis=1)
        values *= gains[: spec.shape[0], : spec.shape[1]]
    return values.astype(np.float32)
