"""The tiny model in PyTorch, for training: DeepSeek V3.2's computation in few operations.

transformers' model of the same weights is the reference (a test compares the two); this one does
without that one's masks and caches, and leaves the head to the caller, who needs it for answers
only. The sparse-attention indexer chooses all positions below ``index_topk`` and the MTP layer
predicts nothing here, so neither is computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.tiny.config import TinySizes, model_config

CONFIG = model_config(TinySizes(), "bf16")
EPS = float(CONFIG["rms_norm_eps"])


def linear(n: int, k: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, k) * gain * k**-0.5)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, EPS)


class Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = linear(2 * intermediate, hidden)
        self.down = linear(hidden, intermediate, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.gate_up, self.down)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    return (functional.silu(gate) * up) @ down.t()


class Moe(nn.Module):
    """Shared expert plus the sigmoid router's experts ("noaux_tc").

    bias: what the router adds to the scores it chooses by, float32 [experts]. load: rows each
    expert has computed while training, float32 [experts].
    """

    bias: Tensor
    load: Tensor

    def __init__(self, sizes: TinySizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, inter, experts = (
            sizes.hidden_size,
            sizes.moe_intermediate_size,
            sizes.n_routed_experts,
        )
        self.gate = linear(experts, hidden)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts))
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inter, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inter) * 0.3 * inter**-0.5)
        self.shared = Mlp(hidden, inter * sizes.n_shared_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, int64 [N, k], and weights, float32 [N, k], of each token's experts."""
        s = self.sizes
        scores = (x @ self.gate.t()).sigmoid()
        with torch.no_grad():
            choice = scores + self.bias
            groups = choice.view(len(x), s.n_group, -1)
            best = groups.topk(2, -1)[0].sum(-1).topk(s.topk_group, -1)[1]
            closed = torch.ones(len(x), s.n_group, dtype=torch.bool).scatter_(1, best, False)
            choice = groups.masked_fill(closed[..., None], -math.inf).view_as(scores)
            ids = choice.topk(s.num_experts_per_tok, -1)[1]
        weights = scores.gather(1, ids)
        scale = float(CONFIG["routed_scaling_factor"])
        return ids, weights * (scale / weights.sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        ids, weights = self.route(x)
        flat = ids.flatten()
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=len(self.gate))
        if self.training:
            self.load += counts
        rows = x[order // ids.shape[1]].split(counts.tolist())
        outputs = [
            mlp(part, gate_up, down)
            for part, gate_up, down in zip(
                rows, self.gate_up.unbind(), self.down.unbind(), strict=True
            )
        ]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        chosen = torch.cat(outputs)[back].view(*ids.shape, -1)
        routed = (weights[:, None] @ chosen).squeeze(1)
        output: Tensor = routed + self.shared(x)
        return output.view(shape)


class Attention(nn.Module):
    def __init__(self, sizes: TinySizes) -> None:
        super().__init__()
        s = self.sizes = sizes
        heads, hidden = s.num_attention_heads, s.hidden_size
        self.q_a = linear(s.q_lora_rank, hidden)
        self.q_norm = Norm(s.q_lora_rank)
        self.q_b = linear(heads * (s.qk_nope_head_dim + s.qk_rope_head_dim), s.q_lora_rank)
        self.kv_a = linear(s.kv_lora_rank + s.qk_rope_head_dim, hidden)
        self.kv_norm = Norm(s.kv_lora_rank)
        self.kv_b = linear(heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)
        self.o = linear(hidden, heads * s.v_head_dim, 0.3)
        rope = CONFIG["rope_scaling"]
        mscale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
        self.scale = (s.qk_nope_head_dim + s.qk_rope_head_dim) ** -0.5 * mscale**2

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        s, (batch, length, _) = self.sizes, x.shape
        heads = s.num_attention_heads
        q = (self.q_norm(x @ self.q_a.t()) @ self.q_b.t()).view(batch, length, heads, -1)
        q_nope, q_rope = q.split([s.qk_nope_head_dim, s.qk_rope_head_dim], -1)
        latent, k_rope = (x @ self.kv_a.t()).split([s.kv_lora_rank, s.qk_rope_head_dim], -1)
        kv = (self.kv_norm(latent) @ self.kv_b.t()).view(batch, length, heads, -1)
        k_nope, v = kv.split([s.qk_nope_head_dim, s.v_head_dim], -1)
        k_rope = rotate(k_rope[:, :, None], rotation).expand(-1, -1, heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, rotation)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=self.scale,
        )
        return out.transpose(1, 2).reshape(batch, length, -1) @ self.o.t()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs of [B, T, heads, rope] by the angles of their position."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


def rotations(size: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [length, 1, size / 2], of YaRN's blend of two frequency ranges."""
    rope, base = CONFIG["rope_scaling"], float(CONFIG["rope_theta"])
    frequency = base ** -(torch.arange(0, size, 2) / size)

    def dimension(turns: float) -> float:
        context = rope["original_max_position_embeddings"]
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension(rope["beta_slow"])), size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequency = frequency / rope["factor"] * ramp + frequency * (1 - ramp)
    angle = torch.arange(length)[:, None, None] * frequency
    return angle.cos(), angle.sin()


class Layer(nn.Module):
    def __init__(self, sizes: TinySizes, moe: bool) -> None:
        super().__init__()
        self.attention_norm = Norm(sizes.hidden_size)
        self.attention = Attention(sizes)
        self.mlp_norm = Norm(sizes.hidden_size)
        self.mlp = Moe(sizes) if moe else Mlp(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class TinyModel(nn.Module):
    """The main model's layers; ``forward`` gives the hidden states before the head."""

    def __init__(self, sizes: TinySizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.randn(sizes.vocab_size, sizes.hidden_size))
        self.layers = nn.ModuleList(
            Layer(sizes, layer in sizes.moe_layers) for layer in range(sizes.num_hidden_layers)
        )
        self.norm = Norm(sizes.hidden_size)
        self.head = linear(sizes.vocab_size, sizes.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states, float32 [B, T, hidden], of int64 [B, T] token ids."""
        rotation = rotations(self.sizes.qk_rope_head_dim, tokens.shape[1])
        x = functional.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, rotation)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, tokens: Tensor) -> Tensor:
        """float32 [B, T, vocabulary]."""
        logits: Tensor = self(tokens) @ self.head.t()
        return logits

    @property
    def decoder_layers(self) -> list[Layer]:
        """``layers``, typed."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def moe_layers(self) -> list[Moe]:
        """The mixtures of experts of the layers that have one."""
        return [layer.mlp for layer in self.decoder_layers if isinstance(layer.mlp, Moe)]
